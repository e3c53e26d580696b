// 12-bit packed bfloat16 weights, bit for bit: the lower byte, and 4 bits that choose the upper byte among the 16 most
// frequent ones; other weights are patches. Weights become bfloat16 again before they are multiplied, in registers for
// a few rows, in the first cache for more, so sums are those of 16-bit weights.
#pragma once

#include <algorithm>

#include "vectors/vectors.h"

namespace river {

constexpr int kUnitVectors = 2 * kHalves;
// Rows up to which weights are unpacked in registers, at least for two of four output features at a time.
constexpr int kFewRows = kHalves == 1 ? 8 : kHalves == 2 ? 6 : kMostRows;

// Output features 2 P and 2 P + 1 of a unit, which share their line of codes. Byte 16 l + j of a line is input feature
// 8 l + j, or for j >= 8 feature 24 + 8 l + j.
template <int P>
class Pair {
 public:
  RIVER_INLINE Pair(const uint8_t* unit, Ints palette) : lower_(unit + (2 + 2 * P) * kUnit) {
    unrolled<kHalves>([&](auto h) RIVER_INLINED {
      const Ints codes = load(unit + P * kUnit + h * kBytes);
      upper_[0][h] = look_up(palette, low_nibbles(codes));
      upper_[1][h] = look_up(palette, high_nibbles(codes));
    });
  }

  // Vector V of the weights of output feature 2 P + T, in order.
  template <int T, int V>
  RIVER_INLINE Ints weights() const {
    constexpr int h = V % kHalves;
    const Ints lower = load(lower_ + T * kUnit + h * kBytes);
    return V < kHalves ? interleave_low(lower, upper_[T][h]) : interleave_high(lower, upper_[T][h]);
  }

 private:
  static constexpr int kBytes = 4 * kLanes;

  const uint8_t* const lower_;
  Ints upper_[2][kHalves];
};

RIVER_INLINE void fetch_unit(const uint8_t* unit) {
  for (int line = 0; line < kUnitBytes; line += 64) __builtin_prefetch(unit + line, 0, 2);
}

// The lines of a pair.
RIVER_INLINE void fetch_pair(const uint8_t* unit, int pair) {
  for (const int line : {pair, 2 + 2 * pair, 3 + 2 * pair}) __builtin_prefetch(unit + line * kUnit, 0, 2);
}

// Four output features of a matrix: their units, and the patches that are left.
struct Four {
  const uint8_t* units;
  const int32_t *next, *end;

  // Whether some of the unit of input feature `i` are patched.
  RIVER_INLINE bool patched(int64_t i) const {
    return __builtin_expect(next < end && next[0] < kFour * (i + kUnit), 0);
  }

  // Unpacks the unit of input feature `i` to `out`, whose rows are `stride` apart; units are taken in order.
  RIVER_INLINE void unpack(Ints palette, int64_t i, uint16_t* out, int64_t stride) {
    unrolled<kFour>([&](auto t) RIVER_INLINED {
      const Pair<t / 2> pair(units + i / kUnit * kUnitBytes, palette);
      unrolled<kUnitVectors>(
          [&](auto v) RIVER_INLINED { store(out + t * stride + v * 2 * kLanes, pair.template weights<t % 2, v>()); });
    });
    for (; patched(i); next += 2) out[next[0] % kFour * stride + next[0] / kFour - i] = uint16_t(next[1]);
  }
};

// A piece of `a.unpacked` for one part, mostly that which other parts of its thread had. None for other weights.
class Piece {
 public:
  Piece(const GemmArgs& a, int part, int parts) : of_(a.is_unpacked() ? a.unpacked : nullptr) {
    if (!of_) return;
    number_ = int(int64_t(part) * of_->count / parts);
    while (__atomic_exchange_n(of_->flags + number_, 1, __ATOMIC_ACQUIRE)) number_ = (number_ + 1) % of_->count;
  }
  ~Piece() {
    if (of_) __atomic_store_n(of_->flags + number_, 0, __ATOMIC_RELEASE);
  }
  Piece(const Piece&) = delete;

  uint16_t* memory() const { return of_ ? reinterpret_cast<uint16_t*>(of_->at(number_)) : nullptr; }

 private:
  const Pieces* const of_;
  int number_ = 0;
};

// What an `UnpackedBlock` keeps in memory: all that was unpacked, for rows that read it again, or one unit. Whole rows
// lie a multiple of 4 KB apart for many sizes, so that the 16 of a block push each other out of the first cache.
enum class Keeps { kAll, kOneUnit };

// One block of 16 output features, and as much of it as was unpacked to memory.
class UnpackedBlock {
 public:
  // Of two blocks that share a piece's memory `which` tells which one this is.
  UnpackedBlock(const GemmArgs& a, int which, uint16_t* memory, Keeps keeps = Keeps::kAll)
      : a_(a),
        padded_(ceil_div(int64_t(a.in_features), kUnit) * kUnit),
        stride_(keeps == Keeps::kAll ? padded_ : kUnit),
        palette_(repeated(reinterpret_cast<const uint8_t*>(a.palette))),
        memory_(memory + which * kBlock * stride_) {}

  void begin(int64_t n) {
    if (block_ == n) return;
    block_ = n;
    for (int four = 0; four < kFours; ++four) fours_[four] = this->four(four), done_[four] = 0;
  }

  Four four(int i) const {
    const int64_t number = block_ * kFours + i, all = ceil_div(int64_t(a_.epilogue.out_features), kBlock) * kFours;
    const int32_t *first = a_.palette + 4 + number, *patches = a_.palette + 4 + all + 1;
    return {a_.weight + number * padded_ / kUnit * kUnitBytes, patches + 2 * first[0], patches + 2 * first[1]};
  }

  // Unpacks the unit of input feature `i` of four output features to memory, unless that was done.
  RIVER_INLINE void reach(int four, int64_t i) {
    if (i < done_[four]) return;
    done_[four] = i + kUnit;
    fetch_unit(fours_[four].units + i / kUnit * kUnitBytes + kFetchedAhead);
    fours_[four].unpack(palette_, i, row(kFour * four) + i, padded_);
  }

  // The same of all output features, read in order: the block that follows is expected `ahead` blocks behind. Returns
  // input feature `i` of the first one; others are a stride apart.
  RIVER_INLINE Matrix<const uint16_t> reach_all(int64_t i, int ahead) {
    const int64_t unit = i / kUnit * kUnit;
    uint16_t* const out = memory_ + (stride_ == padded_ ? unit : 0);
    if (unit >= done_[0]) {
      done_[0] = unit + kUnit;
      const int64_t later = unit + kFetchedAhead / kUnitBytes * kUnit, rest = later - padded_;
      const int64_t fetched = rest < 0 ? later : rest + ahead * kFours * padded_;  // (a four's units are `padded_`)
      for (int four = 0; four < kFours; ++four) {
        fetch_unit(fours_[four].units + fetched / kUnit * kUnitBytes);
        fours_[four].unpack(palette_, unit, out + kFour * four * stride_, stride_);
      }
    }
    return {out + i - unit, stride_};
  }

  uint16_t* row(int feature) const { return memory_ + feature * padded_; }
  int64_t in_features() const { return padded_; }
  Ints palette() const { return palette_; }

 private:
  static constexpr int kFours = kBlock / kFour;

  const GemmArgs& a_;
  const int64_t padded_, stride_;
  const Ints palette_;
  uint16_t* const memory_;
  int64_t block_ = -1, done_[kFours];
  Four fours_[kFours];
};

// Input features whose activations stay in the first cache while all features of a `Four` meet them.
constexpr int64_t kStretch = 16 * kUnit;

// y[r][t] for R rows and the features of a `Four`; `add(sum, weights, i, r)` adds products from input feature `i` on.
// Features of more than kMost rows are taken two at a time; `kShared`: two features share activations in registers.
template <int R, int kMost, bool kShared, class Add, class Total>
RIVER_INLINE void dots_of_four(Four four, Ints palette, int64_t in_features, Matrix<float> y, const Add& add,
                               const Total& total) {
  constexpr int kTogether = R <= kMost ? kFour : kFour / 2, kTurns = kFour / kTogether;
  Floats kept[kTurns][R][kTogether] = {};
  Four left[kTurns];
  std::fill(left, left + kTurns, four);
  const int64_t stretch = kTurns == 1 ? in_features : std::min(kStretch, in_features);
  for (int64_t first = 0; first < in_features; first += stretch) {
    const int64_t end = std::min(first + stretch, in_features);
    unrolled<kTurns>([&](auto g) RIVER_INLINED {
      Floats sums[R][kTogether];
      unrolled<R>([&](auto r) RIVER_INLINED {
        unrolled<kTogether>([&](auto of) RIVER_INLINED { sums[r][of] = kept[g][r][of]; });
      });
      for (int64_t i = first; i < end; i += kUnit) {
        const uint8_t* unit = four.units + i / kUnit * kUnitBytes;
        alignas(64) uint16_t unpacked[kFour * kUnit];
        // (What the same turn reads in the next stretch: if one asked for all, memory would idle in the other.)
        kTurns == 1 ? fetch_unit(unit + kFetchedAhead) : fetch_pair(unit + stretch / kUnit * kUnitBytes, g);
        // `weights_of(v, t)`: vector v of feature t, of which the compiler makes two loops, so that it joins no
        // registers.
        const auto products = [&](auto p, const auto& weights_of) RIVER_INLINED {
          unrolled<kUnitVectors>([&](auto v) RIVER_INLINED {
            const Ints first = weights_of(v, std::integral_constant<int, 0>());
            const Ints second = weights_of(v, std::integral_constant<int, 1>());
            const auto meet = [&](auto r, auto t, Ints weights) RIVER_INLINED {
              sums[r][2 * p + t] = add(sums[r][2 * p + t], weights, i + v * 2 * kLanes, r);
            };
            constexpr std::integral_constant<int, 0> kFirst;
            constexpr std::integral_constant<int, 1> kSecond;
            unrolled<R>([&](auto r) RIVER_INLINED {
              meet(r, kFirst, first);
              if constexpr (kShared) meet(r, kSecond, second);
            });
            if constexpr (!kShared) unrolled<R>([&](auto r) RIVER_INLINED { meet(r, kSecond, second); });
          });
        };
        if (left[g].patched(i)) {
          left[g].unpack(palette, i, unpacked, kUnit);
          unrolled<kTogether / 2>([&](auto p) RIVER_INLINED {
            products(p, [&](auto v, auto t) RIVER_INLINED {
              const uint16_t* const at = unpacked + (g * kTogether + 2 * p + t) * kUnit + v * 2 * kLanes;
              return load(reinterpret_cast<const uint8_t*>(at));
            });
          });
        } else {
          unrolled<kTogether / 2>([&](auto p) RIVER_INLINED {
            const Pair<g * kTogether / 2 + p> pair(unit, palette);
            products(p, [&](auto v, auto t) RIVER_INLINED { return pair.template weights<t, v>(); });
          });
        }
      }
      unrolled<R>([&](auto r) RIVER_INLINED {
        unrolled<kTogether>([&](auto of) RIVER_INLINED { kept[g][r][of] = sums[r][of]; });
      });
    });
  }
  unrolled<R>([&](auto r) RIVER_INLINED {
    Floats sums[kFour];
    unrolled<kFour>([&](auto t) RIVER_INLINED { sums[t] = kept[t / kTogether][r][t % kTogether]; });
    total(sums, y.data + r * y.stride);
  });
}

// Sums of 12-bit weights: up to kFewRows rows by `few(block, four, r, y)`, r a constant; more by `many(block, four,
// y)`.
class Bf12Blocks {
 public:
  Bf12Blocks(const GemmArgs& a, int part, int parts)
      : piece_(a, part, parts), first_(a, 0, piece_.memory()), second_(a, 1, piece_.memory()) {}

  template <class Few, class Many>
  void sum(const GemmArgs& a, int64_t n, int rows, float (*y)[kBlock], const Few& few, const Many& many) {
    UnpackedBlock& block = n < a.epilogue.blocks() ? first_ : second_;
    block.begin(n);
    for (int four = 0; four < kBlock / kFour; ++four) {
      const Matrix<float> to{y[0] + kFour * four, kBlock};
      if (rows > kFewRows) many(block, four, to);
      unrolled<kFewRows>([&](auto r) RIVER_INLINED {
        if (r + 1 == rows) few(block, four, std::integral_constant<int, r + 1>(), to);
      });
    }
  }

 private:
  const Piece piece_;
  UnpackedBlock first_, second_;
};

}  // namespace river
