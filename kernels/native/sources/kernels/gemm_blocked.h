// The loop around a microkernel of up to 16 rows and 16 output features, for one or several dense matrices.
#pragma once

#include <algorithm>

#include "kernels/epilogue.h"

namespace river {

// A microkernel (a, n, row, rows, y) leaves y[r][i] = sum over k of weight[16 n + i, k] x[row + r, k] for `rows` <= R.
template <int R, class Microkernel>
void gemm_block(const GemmArgs& a, int64_t n, int row, int rows, const Microkernel& microkernel) {
  const Epilogue& e = a.epilogue;
  float y[R][kBlock], up[R][kBlock];
  if (e.gated == kGatePairs) {
    microkernel(a, 2 * n, row, rows, y);
    microkernel(a, 2 * n + 1, row, rows, up);
    if (e.bias.count) add_bias(e, 2 * n * kBlock, kBlock, rows, kBlock, y[0]);
    if (e.bias.count) add_bias(e, (2 * n + 1) * kBlock, kBlock, rows, kBlock, up[0]);
    separate_pairs(rows, y, up);
  } else {
    microkernel(a, n, row, rows, y);
    if (e.gated) microkernel(a, n + e.blocks(), row, rows, up);
  }
  epilogue(e, n * kBlock, row, rows, y[0], up[0]);
}

constexpr int kRowsTogether = 256;  // whose activations stay in a core's cache while weights pass by

// Blocks of 16 rows, one after the other for each block of features.
template <class Microkernel>
void gemm_blocked(const GemmArgs& a, int part, int parts, const Microkernel& microkernel,
                  int together = kRowsTogether) {
  for (int first = 0; first < a.rows; first += together)
    for (auto [n, end] = a.blocks_of(part, parts); n < end; ++n)
      for (int row = first; row < std::min(first + together, a.rows); row += kBlock)
        gemm_block<16>(a, n, row, std::min(kBlock, a.rows - row), microkernel);
}

// Calls f(weights, number within the block, how many) for block `n`, by fours within one matrix, else one by one.
template <class F>
RIVER_INLINE void for_fours(const GemmArgs& a, int64_t n, int64_t bytes, const F& f) {
  const int64_t first = n * kBlock;
  const int count = int(std::min<int64_t>(kBlock, a.epilogue.out_features - first));
  for (int i = 0; i < count;) {
    const int matrix = matrix_of(a.dense, first + i);
    const int64_t at = first + i - a.dense.first[matrix];
    const char* weight = static_cast<const char*>(a.dense.data[matrix]) + at * a.in_features * bytes;
    if (i + 4 <= count && first + i + 4 <= a.dense.first[matrix + 1]) {
      f(weight, i, std::integral_constant<int, 4>());
      i += 4;
    } else {
      f(weight, i++, std::integral_constant<int, 1>());
    }
  }
}

}  // namespace river
