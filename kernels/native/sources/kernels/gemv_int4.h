// Matmuls of a few rows with 4-bit weights, which are read once; up to kRows rows share an unpacked line. Outputs are
// summed group by group for any rows, threads or parts: integer products exactly, times the scale, then the zero times
// the sum of activations. Not handled: many rows at the speed of a tiled matmul.
#pragma once

#include <algorithm>

#include "kernels/gemm_blocked.h"

#if defined(RIVER_NEON_DOTS)
#include "kernels/gemv_int4_neon.h"
#endif

namespace river {

constexpr int kRows = kHalves == 4 ? 4 : 8;
constexpr int kLine = 64;

struct Row {
  const int8_t* values;
  const float* scale;
  const float* sum;
  const int32_t* start;
};

#if defined(RIVER_NEON_DOTS)
// Returns, for R rows and the vectors of output features, the sums of (q - 8) x over one group.
template <int R>
RIVER_INLINE void sums_of_group(const uint8_t* w, const Row* x, int64_t g, int lines, Floats (*out)[R]) {
  const int8_t* values[R];
  int32_t start[R];
  for (int r = 0; r < R; ++r) values[r] = x[r].values + g * lines * 8, start[r] = x[r].start[g];
  int32x4_t sums[R][kHalves];
  sums_of_lines<R>(w, values, start, lines, sums);
  unrolled<kHalves * R>([&](auto i) RIVER_INLINED {
    constexpr int h = i / R, r = i % R;
    out[h][r] = to_floats((Ints)sums[r][h]) * every(x[r].scale[g]);
  });
}
#else
// Returns, for R rows and one vector of output features, the sum of (q - 8) x over one group.
template <int R>
RIVER_INLINE void sums_of_vector(const uint8_t* w, const Row* x, int64_t g, int lines, Floats* out) {
  Dots low[R], high[R];
  for (int r = 0; r < R; ++r) low[r].begin(x[r].start[g]), high[r].begin(0);
  for (int i = 0; i < lines; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Ints line = load(w + (i + j) * kLine);
      fetch(w + (i + j) * kLine);
      const Ints first = low_nibbles(line), second = high_nibbles(line);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int8_t* values = x[r].values + (g * lines + i + j) * 8;
        low[r].add(first, values);
        (R == 1 ? high[r] : low[r]).add(second, values + 4);
      }
    }
    for (int r = 0; r < R; ++r) low[r].widen(), high[r].widen();
  }
  for (int r = 0; r < R; ++r) {
    const Ints total = R == 1 ? add(low[r].sum, high[r].sum) : low[r].sum;
    out[r] = to_floats(total) * every(x[r].scale[g]);
  }
}
#endif

// One block of output features for `rows` <= R rows; the last row stands in for those that are not there.
template <int R>
void microkernel_int4(const GemmArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
  const int lines = a.group_size / 8;
  const int64_t groups = a.groups();
  Row x[R];
  for (int r = 0; r < R; ++r) {
    const int64_t at = row + std::min(r, rows - 1), of = at * groups;
    x[r] = {static_cast<const int8_t*>(a.x.values) + of * a.group_size, a.x.scale + of, a.x.sum + of, a.x.start + of};
  }
  const uint8_t* weight = a.weight + n * groups * lines * kLine;
  const auto* parameters = reinterpret_cast<const uint8_t*>(a.scale_zero) + n * groups * kLine;
  Floats sums[kHalves][R];
  for (auto& half : sums)
    for (Floats& sum : half) sum = zeros();
  const auto add = [&](int h, int64_t g, const Floats* products) RIVER_INLINED {
    const Ints pair = load(parameters + h * 4 * kLanes);
    const Floats scale = low_bfloat16(pair), zero = high_bfloat16(pair);
    for (int r = 0; r < R; ++r) sums[h][r] = fma(zero, every(x[r].sum[g]), fma(products[r], scale, sums[h][r]));
  };
  for (int64_t g = 0; g < groups; ++g, weight += lines * kLine, parameters += kLine) {
#if defined(RIVER_NEON_DOTS)
    Floats products[kHalves][R];
    sums_of_group<R>(weight, x, g, lines, products);
    unrolled<kHalves>([&](auto h) RIVER_INLINED { add(h, g, products[h]); });
#else
    Floats products[R];
    for (int h = 0; h < kHalves; ++h) {
      sums_of_vector<R>(weight + h * 4 * kLanes, x, g, lines, products);
      add(h, g, products);
    }
#endif
  }
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < kHalves; ++h) store(y[r] + h * kLanes, sums[h][r]);
}

// Up to kRows rows of a block, by the kernel of 1, 2, 4, 6 or 8.
inline void gemv_rows(const GemmArgs& a, int64_t n, int row, int rows) {
  unrolled<kRows / 2 + 1>([&](auto half) {
    constexpr int kSize = half ? 2 * half : 1;
    if (rows == kSize || (rows > 2 && rows + 1 == kSize)) gemm_block<kSize>(a, n, row, rows, microkernel_int4<kSize>);
  });
}

inline void write_unwanted(const GemmArgs& a, int64_t from, int64_t to) {
  const Epilogue& e = a.epilogue;
  alignas(64) float unwanted[kBlock];
  std::fill(unwanted, unwanted + kBlock, kMaskedLogit);
  for (int64_t n = from; n < to; ++n) {
    const int count = int(std::min<int64_t>(kBlock, e.out_features - n * kBlock));
    for (int row = 0; row < a.rows; ++row)
      store_values(e.y.data, row * e.y.stride + n * kBlock, count, e.dtype, unwanted);
  }
}

// A part computes its share of all blocks, or of those that are listed and what lies between these and the next ones.
inline void gemv_int4(const GemmArgs& a, int part, int parts) {
  const int64_t blocks = a.epilogue.blocks();
  const bool all = !a.vocab_blocks || a.vocab_blocks[0] >= blocks;
  const int32_t* listed = all ? nullptr : a.vocab_blocks + 1;
  const int64_t count = all ? blocks : a.vocab_blocks[0];
  for (auto [i, end] = all ? a.blocks_of(part, parts) : share_of(count, part, parts); i < end; ++i) {
    const int64_t n = all ? i : listed[i];
    if (!all && i == 0) write_unwanted(a, 0, n);
    if (!all) write_unwanted(a, n + 1, i + 1 < count ? listed[i + 1] : blocks);
    for (int row = 0; row < a.rows; row += kRows) gemv_rows(a, n, row, std::min(kRows, a.rows - row));
  }
}

}  // namespace river
