// Few rows of activations with bfloat16 stacks [K, N], read as they lie. A vector holds output features, and each lane
// of the sums that a dot product with [N, K] has is a vector here: the additions are the same, in the same order. Rows
// of a matrix often lie a multiple of 4 KB apart, where caches keep few lines and memory is slow. So all features that
// a part computes are summed up together, and rows are read from their first to their last one. Not handled: many rows,
// other dtypes, and output features behind the last whole line.
#pragma once

#include <algorithm>
#include <cstring>

#include "phases.h"
#include "vectors/vectors.h"

namespace river {

// The numbers of kLanes neighbors of two rows: those of `low` in the lower halves of words, those of `high` above them.
RIVER_INLINE Ints pairs_of(const char* low, const char* high) {
#if defined(RIVER_AVX512)
  alignas(64) static constexpr uint16_t kOrder[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), _mm512_inserti64x4(first, second, 1));
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  typedef uint32_t Wide __attribute__((vector_size(4 * kLanes)));
  Halves a, b;
  std::memcpy(&a, low, sizeof a);
  std::memcpy(&b, high, sizeof b);
  return (Ints)(__builtin_convertvector(a, Wide) | __builtin_convertvector(b, Wide) << 16);
#endif
}

// The products of up to kMostRows rows with neighboring blocks of 16 output features.
class ColumnBlocks {
 public:
  // `memory` has room for the sums of `most` blocks.
  ColumnBlocks(char* memory, int most) : sums_(reinterpret_cast<float*>(memory)), most_(most) {}

  // y[r][i] for block `n`, one of those up to `end - 1`, of whole lines. `add(sum, pairs, r, k, lane)` adds the
  // products with the features k + 2 lane and the next; `total` sums up the lanes of four output features.
  template <class Add, class Total>
  void product(const GemmArgs& a, int64_t n, int64_t end, int row, int rows, float (*y)[kBlock], const Add& add,
               const Total& total) {
    if (n < first_ || n >= end_ || row != row_) {
      first_ = n / kTileBlocks * kTileBlocks;
      end_ = std::min(first_ + most_ / rows / kTileBlocks * kTileBlocks, ceil_div(end, kTileBlocks) * kTileBlocks);
      row_ = row;
      sum(a, rows, add);
    }
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < kBlock; i += 4) {
        alignas(64) float lanes[4][kLanes];
        for (int t = 0; t < 4; ++t)
          for (int lane = 0; lane < kLanes; ++lane) lanes[t][lane] = sums_of(r, n, lane)[i + t];
        Floats four[4];
        for (int t = 0; t < 4; ++t) four[t] = load_floats(lanes[t]);
        total(four, y[r] + i);
      }
  }

 private:
  // The sums that registers hold: of some lanes, each of some vectors of output features.
  static constexpr int kTileLanes = kHalves == 1 ? 8 : 4, kTileVectors = kHalves == 4 ? 4 : 2;
  static constexpr int kTileRows = 2 * kTileLanes, kTileColumns = kTileVectors * kLanes;
  static constexpr int64_t kTileBlocks = kTileColumns / kBlock;
  static_assert(kTileColumns % kBlock == 0 && kLanes % kTileLanes == 0 && kLanes * kBlock * 4 <= kColumnBytes);

  // Of a row, a block and a lane, of 16 output features.
  float* sums_of(int r, int64_t n, int lane) const {
    return sums_ + ((r * (end_ - first_) + n - first_) * kLanes + lane) * kBlock;
  }

  template <class Add>
  void sum(const GemmArgs& a, int rows, const Add& add) {
    alignas(64) static constexpr char kZeros[kTileColumns * 2] = {};
    const int64_t stride = a.epilogue.out_features * 2, k = a.in_features;
    const char* const weight = static_cast<const char*>(a.dense.data[0]);
    std::memset(sums_, 0, rows * (end_ - first_) * kLanes * kBlock * sizeof(float));
    for (int64_t i = 0; i < k; i += kTileRows) {
      const int64_t turn = i / (2 * kLanes) * (2 * kLanes);
      const char* ahead[kTileRows];
      for (int j = 0; j < kTileRows; ++j) ahead[j] = weight + std::min(i + kTileRows + j, k - 1) * stride;
      for (int64_t n = first_; n < end_; n += kTileBlocks) {
        const int64_t at = n * kBlock * 2;
        for (const char* next : ahead) __builtin_prefetch(next + at, 0, 2);
        for (int r = 0; r < rows; ++r)
          add_tile(
              r, n, int(i - turn) / 2,
              [&](int j, Floats sum, Ints pairs, int lane) RIVER_INLINED { return add(sum, pairs, r, turn, lane); },
              [&](int j) RIVER_INLINED { return i + j < k ? weight + (i + j) * stride + at : kZeros; });
      }
    }
  }

  template <class Add, class RowOf>
  RIVER_INLINE void add_tile(int r, int64_t n, int first_lane, const Add& add, const RowOf& row_of) {
    const auto at = [&](auto l, auto v) RIVER_INLINED {
      constexpr int kColumn = v * kLanes;
      return sums_of(r, n + kColumn / kBlock, first_lane + l) + kColumn % kBlock;
    };
    Floats sums[kTileLanes][kTileVectors];
    const auto each = [&](const auto& f) RIVER_INLINED {
      unrolled<kTileLanes>([&](auto l)
                               RIVER_INLINED { unrolled<kTileVectors>([&](auto v) RIVER_INLINED { f(l, v); }); });
    };
    each([&](auto l, auto v) RIVER_INLINED { sums[l][v] = load_floats(at(l, v)); });
    unrolled<kTileLanes>([&](auto l) RIVER_INLINED {
      const char *const low = row_of(2 * l), *const high = row_of(2 * l + 1);
      unrolled<kTileVectors>([&](auto v) RIVER_INLINED {
        const Ints pairs = pairs_of(low + v * kLanes * 2, high + v * kLanes * 2);
        sums[l][v] = add(2 * l, sums[l][v], pairs, first_lane + l);
      });
    });
    each([&](auto l, auto v) RIVER_INLINED { store(at(l, v), sums[l][v]); });
  }

  float* const sums_;  // [row, block, lane, 16]
  const int64_t most_;
  int64_t first_ = 0, end_ = 0;
  int row_ = -1;
};

}  // namespace river
