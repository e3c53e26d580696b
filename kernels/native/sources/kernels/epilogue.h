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

// Finishes and writes the sums of features `first` to `first + kColumns - 1`, [rows, kColumns]; `up` if it is gated.
template <int kColumns = kBlock>
void epilogue(const Epilogue& e, int64_t first, int row, int rows, float* y, float* up) {
  const int count = int(std::min<int64_t>(kColumns, e.width() - first)), all = values_of<kColumns>(rows, count);
  if (e.bias.count) {
    add_bias(e, first, count, rows, kColumns, y);
    if (e.gated) add_bias(e, e.width() + first, count, rows, kColumns, up);
  }
  activate(e.activation, y, all);
  for (int i = 0; e.gated && i < all; ++i) y[i] *= up[i];
  if (e.residual.data) {
    alignas(64) float residual[kMostLoaded<kColumns>];
    load_block<kColumns>(e.residual.data, row * e.residual.stride + first, e.residual.stride, rows, count, e.dtype,
                         residual);
    for (int i = 0; i < all; ++i) y[i] += residual[i];
  }
  store_block<kColumns>(e.y.data, row * e.y.stride + first, e.y.stride, rows, count, e.dtype, y);
}

}  // namespace river
