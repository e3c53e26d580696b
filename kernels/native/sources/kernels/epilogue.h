// What follows the sums of a matmul: a bias, an activation or a gate, and a residual.
#pragma once

#include <algorithm>

#include "vectors/vector_math.h"

namespace river {

inline int matrix_of(const Rows& rows, int64_t row) {
  int matrix = 0;
  while (row >= rows.first[matrix + 1]) ++matrix;
  return matrix;
}

inline void add_bias(const Epilogue& e, int64_t first, int count, int rows, int columns, float* y) {
  for (int i = 0; i < count; ++i) {
    const int vector = matrix_of(e.bias, first + i);
    const float bias = load_scalar(e.bias.data[vector], first + i - e.bias.first[vector], e.dtype);
    for (int r = 0; r < rows; ++r) y[r * columns + i] += bias;
  }
}

// Sums of two blocks of pairs, gate and up projection, become those of 16 gates, and of their partners.
inline void separate_pairs(int rows, float (*first)[kBlock], float (*second)[kBlock]) {
  for (int r = 0; r < rows; ++r) {
    float pairs[2 * kBlock];
    std::copy(first[r], first[r] + kBlock, pairs);
    std::copy(second[r], second[r] + kBlock, pairs + kBlock);
    for (int i = 0; i < kBlock; ++i) first[r][i] = pairs[2 * i], second[r][i] = pairs[2 * i + 1];
  }
}

// Multiplies activated gates by the up projection.
inline void multiply_gates(const Epilogue& e, int count, float* y, const float* up) {
  if (e.activation == kClampedSwish)
    for (int i = 0; i < count; ++i) y[i] *= 1.0f + std::min(std::max(up[i], -kSwishLimit), kSwishLimit);
  else
    for (int i = 0; i < count; ++i) y[i] *= up[i];
}

// Finishes and writes the sums of features `first` to `first + kColumns - 1`, [rows, kColumns]; `up` if it is gated.
template <int kColumns = kBlock>
void epilogue(const Epilogue& e, int64_t first, int row, int rows, float* y, float* up) {
  const int count = int(std::min<int64_t>(kColumns, e.width() - first)), all = values_of<kColumns>(rows, count);
  if (e.bias.count && e.gated != kGatePairs) {
    add_bias(e, first, count, rows, kColumns, y);
    if (e.gated) add_bias(e, e.width() + first, count, rows, kColumns, up);
  }
  activate(e.activation, y, all);
  if (e.gated) multiply_gates(e, all, y, up);
  if (e.residual.data) {
    alignas(64) float residual[kMostLoaded<kColumns>];
    load_block<kColumns>(e.residual.data, row * e.residual.stride + first, e.residual.stride, rows, count, e.dtype,
                         residual);
    for (int i = 0; i < all; ++i) y[i] += residual[i];
  }
  store_block<kColumns>(e.y.data, row * e.y.stride + first, e.y.stride, rows, count, e.dtype, y);
}

}  // namespace river
