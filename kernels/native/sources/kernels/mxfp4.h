// MXFP4 weights as checkpoints hold them, and stacks [K, N]: both are read as bfloat16, so that sums are those of
// 16-bit weights. A group of 32 input features is 16 bytes of E2M1 numbers, feature 2 j in the low nibble of byte j and
// 2 j + 1 in the high one, times 2^(exponent - 127).
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/bf12.h"
#include "kernels/columns.h"
#include "kernels/gemm_blocked.h"

namespace river {

// The bfloat16 numbers of a code, magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6 and then the same below zero, by exponent;
// beyond bfloat16 infinite. Exponent 255 is no number.
struct Mxfp4Numbers {
  alignas(32) uint16_t of[256][16];
};

constexpr Mxfp4Numbers mxfp4_numbers() {
  Mxfp4Numbers numbers{};
  for (int scale = 0; scale < 256; ++scale)
    for (int code = 0; code < 16; ++code) {
      const int magnitude = code & 7, fraction = magnitude > 1 ? magnitude % 2 * 64 : 0;
      const int exponent = scale + magnitude / 2 - 1;
      const int bits = scale == 255     ? 0x7fc0
                       : !magnitude     ? 0
                       : exponent > 254 ? 0x7f80
                       : exponent > 0   ? exponent * 128 + fraction
                                        : (128 + fraction) >> (1 - exponent);
      numbers.of[scale][code] = uint16_t(bits | code / 8 << 15);
    }
  return numbers;
}

inline constexpr Mxfp4Numbers kMxfp4 = mxfp4_numbers();

// The weights in kLanes bytes of a group, in order.
RIVER_INLINE Ints weights_of_mxfp4(const uint8_t* bytes, const uint16_t* numbers) {
  const Bits wide = (Bits)widened(bytes), codes = wide | wide << 12;  // in the lower bits of each 16, above them others
#if defined(RIVER_AVX512)
  const auto* table = reinterpret_cast<const __m256i*>(numbers);
  return _mm512_permutexvar_epi16((Ints)codes, _mm512_broadcast_i64x4(_mm256_load_si256(table)));
#else
  const Bits magnitudes = codes & 0x00070007u;
  const Bits places = magnitudes << 1 | magnitudes << 9 | 0x01000100u;
  return (Ints)((Bits)look_up(repeated(reinterpret_cast<const uint8_t*>(numbers)), (Ints)places) |
                (codes << 12 & 0x80008000u));
#endif
}

// Four output features; of fewer the last one stands for those that are missing.
struct Mxfp4Four {
  const uint8_t *weight[kFour], *exponents[kFour];
  int64_t groups;

  // y[r][t] for up to kMostRows rows; `add(sum, weights, i, r)` adds products from input feature `i` on.
  template <class Add, class Total>
  RIVER_INLINE void dots(int rows, Matrix<float> y, const Add& add, const Total& total) const {
    unrolled<kMostRows>([&](auto r) RIVER_INLINED {
      if (r + 1 == rows) dots_of<r + 1>(y, add, total);
    });
  }

 private:
  template <int R, class Add, class Total>
  RIVER_INLINE void dots_of(Matrix<float> y, const Add& add, const Total& total) const {
    Floats sums[R][kFour] = {};
    for (int64_t group = 0; group < groups; ++group) {
      unrolled<kFour>([&](auto t) RIVER_INLINED {
        const uint8_t* const bytes = weight[t] + group * kBytes;
        // (What the same feature of the next four has there: a processor's own prefetching stops at every page.)
        if (group % 4 == 0) __builtin_prefetch(bytes + kFour * groups * kBytes, 0, 2);
        const uint16_t* const numbers = kMxfp4.of[exponents[t][group]];
        unrolled<kBytes / kLanes>([&](auto v) RIVER_INLINED {
          const Ints weights = weights_of_mxfp4(bytes + v * kLanes, numbers);
          unrolled<R>([&](auto r) RIVER_INLINED {
            sums[r][t] = add(sums[r][t], weights, group * kMxGroup + v * 2 * kLanes, r);
          });
        });
      });
    }
    unrolled<R>([&](auto r) RIVER_INLINED { total(sums[r], y.data + r * y.stride); });
  }

  static constexpr int kBytes = kMxGroup / 2;
};

// Calls f(four, number within the block) for block `n`.
template <class F>
RIVER_INLINE void for_fours_of_mxfp4(const GemmArgs& a, int64_t n, const F& f) {
  const int64_t groups = a.in_features / kMxGroup, last = a.epilogue.out_features - 1;
  for (int at = 0; at < kBlock && n * kBlock + at <= last; at += kFour) {
    Mxfp4Four four{.groups = groups};
    for (int t = 0; t < kFour; ++t) {
      const int64_t feature = std::min(n * kBlock + at + t, last);
      four.weight[t] = a.weight + feature * groups * (kMxGroup / 2);
      four.exponents[t] = a.exponents + feature * groups;
    }
    f(four, at);
  }
}

// Blocks of 16 output features as a matrix in the activations' dtype, in memory.
class MadeBlocks {
 public:
  MadeBlocks(const GemmArgs& a, int part, int parts)
      : bytes_(bytes_of(a.epilogue.dtype)),
        padded_(ceil_div(int64_t(a.in_features), kUnit) * kUnit),
        piece_(a, part, parts) {}

  // The product with block `n` alone.
  GemmArgs product(const GemmArgs& a, int64_t n) {
    const int which = a.epilogue.gated == kGatePairs ? int(n % 2) : n >= a.epilogue.blocks();
    char* const memory = reinterpret_cast<char*>(piece_.memory()) + which * kBlock * padded_ * bytes_;
    if (made_[which] != n) a.exponents ? unpack(a, n, memory) : transpose_block(a, n, memory);
    made_[which] = n;
    GemmArgs alone = a;
    alone.exponents = nullptr;
    alone.transposed = 0;
    alone.dense = {{memory}, {0, kBlock}, 1};
    alone.in_features = int32_t(padded_);
    alone.epilogue.out_features = kBlock;
    return alone;
  }

  // What a piece has behind the blocks.
  char* behind(const GemmArgs& a) const { return reinterpret_cast<char*>(piece_.memory()) + a.two_blocks_bytes(); }

 private:
  static int count_of(const GemmArgs& a, int64_t n) {
    return int(std::min<int64_t>(kBlock, a.epilogue.out_features - n * kBlock));
  }

  void unpack(const GemmArgs& a, int64_t n, char* memory) const {
    const int64_t groups = a.in_features / kMxGroup;
    std::memset(memory, 0, kBlock * padded_ * 2);
    for (int i = 0; i < count_of(a, n); ++i) {
      const uint8_t* bytes = a.weight + (n * kBlock + i) * groups * (kMxGroup / 2);
      const uint8_t* exponents = a.exponents + (n * kBlock + i) * groups;
      auto* to = reinterpret_cast<uint16_t*>(memory) + i * padded_;
      for (int64_t at = 0; at < groups * (kMxGroup / 2); at += kLanes)
        store(to + 2 * at, weights_of_mxfp4(bytes + at, kMxfp4.of[exponents[at / (kMxGroup / 2)]]));
    }
  }

  // From [K, N], 16 columns of 16 words at a time, which are numbers of 32 bits or pairs of 16 from two rows.
  void transpose_block(const GemmArgs& a, int64_t n, char* memory) const {
    const int64_t stride = a.epilogue.out_features * bytes_, rows_of_word = 4 / bytes_;
    const char* const first = static_cast<const char*>(a.dense.data[0]) + n * kBlock * bytes_;
    const int count = count_of(a, n);
    const auto row_of = [&](int64_t k) { return k < a.in_features ? first + k * stride : nullptr; };
    for (int64_t k = 0; k < padded_; k += kBlock * rows_of_word) {
      alignas(64) uint32_t words[kBlock * kBlock], columns[kBlock * kBlock];
      for (int64_t i = 0; i < kBlock; ++i) {
        const int64_t row = k + i * rows_of_word;
        for (int64_t ahead = 0; ahead < rows_of_word; ++ahead)  // (each row lies in another page)
          __builtin_prefetch(first + std::min<int64_t>(row + ahead + kRowsAhead, a.in_features - 1) * stride);
        uint32_t* const to = words + i * kBlock;
        if (bytes_ == 4)
          read<uint32_t>(row_of(row), count, to);
        else if (count == kBlock && row + 1 < a.in_features)
          for (int j = 0; j < kBlock; ++j) to[j] = pair(row_of(row), row_of(row + 1), j);
        else
          read_pairs(row_of(row), row_of(row + 1), count, to);
      }
      transpose(words, kBlock, columns);
      for (int i = 0; i < kBlock; ++i)
        std::memcpy(memory + (i * padded_ + k) * bytes_, columns + i * kBlock, kBlock * 4);
    }
  }

  static constexpr int kRowsAhead = 96;

  static uint32_t pair(const char* low, const char* high, int j) {
    uint16_t halves[2];
    std::memcpy(halves, low + 2 * j, 2);
    std::memcpy(halves + 1, high + 2 * j, 2);
    return halves[0] | uint32_t(halves[1]) << 16;
  }

  // The first `count` numbers of a row, zeros without one.
  template <class T>
  static void read(const char* row, int count, T* to) {
    std::fill(to, to + kBlock, T(0));
    if (row) std::memcpy(to, row, count * sizeof(T));
  }

  static void read_pairs(const char* low, const char* high, int count, uint32_t* to) {
    uint16_t halves[2][kBlock];
    read(low, count, halves[0]);
    read(high, count, halves[1]);
    for (int j = 0; j < kBlock; ++j) to[j] = halves[0][j] | uint32_t(halves[1][j]) << 16;
  }

  const int64_t bytes_, padded_;
  const Piece piece_;
  int64_t made_[2] = {-1, -1};
};

// A few rows of MXFP4 weights by `few`, all others by blocks in memory, which the microkernel of a matrix reads.
template <class Microkernel>
void gemm_of_made_blocks(const GemmArgs& a, int part, int parts,
                         void (*few)(const GemmArgs&, int64_t, int, int, float (*)[kBlock]),
                         const Microkernel& microkernel, int together = kRowsTogether) {
  MadeBlocks blocks(a, part, parts);
  gemm_blocked(
      a, part, parts,
      [&](const GemmArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
        if (a.exponents && rows <= kMostRows) return few(a, n, row, rows, y);
        microkernel(blocks.product(a, n), 0, row, rows, y);
      },
      together);
}

// A few rows with a bfloat16 stack [K, N] by columns, all others by blocks in memory. `add(sum, pairs, x, k, lane)`
// adds the products with the features k + 2 lane and the next of the row x.
template <class Add, class Total, class Microkernel>
void gemm_of_columns(const GemmArgs& a, int part, int parts, const Add& add, const Total& total,
                     const Microkernel& microkernel, int together = kRowsTogether) {
  const Epilogue& e = a.epilogue;
  const Share share = a.blocks_of(part, parts);
  const bool two = e.gated == kGateFirst;  // whose blocks alternate with the others
  const int64_t row_bytes = a.padded_features() * (a.x.format == kBFloat16Rows ? 2 : 4);
  const int64_t whole = e.out_features / (2 * kBlock) * 2;
  MadeBlocks blocks(a, part, parts);
  constexpr int kHalf = kColumnBlocks / 2;
  ColumnBlocks columns[] = {{blocks.behind(a), two ? kHalf : kColumnBlocks},
                            {blocks.behind(a) + kHalf * kColumnBytes, kHalf}};
  gemm_blocked(
      a, part, parts,
      [&](const GemmArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
        if (rows > kMostRows || n >= whole) return microkernel(blocks.product(a, n), 0, row, rows, y);
        const bool second = two && n >= e.blocks();
        const int64_t end = e.gated == kGatePairs ? 2 * share.end : share.end + (second ? e.blocks() : 0);
        const char* const x = static_cast<const char*>(a.x.values) + row * row_bytes;
        columns[second].product(
            a, n, std::min(end, whole), row, rows, y,
            [&](Floats sum, Ints pairs, int r, int64_t k, int lane)
                RIVER_INLINED { return add(sum, pairs, x + r * row_bytes, k, lane); },
            total);
      },
      together);
}

}  // namespace river
