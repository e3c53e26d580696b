// What follows a product of many rows, which a library computed: an activation or a gate, and a residual.
#pragma once

#include <algorithm>

#include "dense.h"
#include "functions.h"
#include "phases.h"
#include "scalars.h"

namespace river {

constexpr int kColumns = 512;  // features that are finished together

// Reads features first..first + count - 1 of a row of matrices that lie side by side.
inline void load_columns(const Rows& product, int64_t row, int64_t first, int count, int32_t dtype, float* values) {
  for (int done = 0; done < count;) {
    const int matrix = matrix_of(product, first + done);
    const int64_t begin = product.first[matrix], width = product.first[matrix + 1] - begin;
    const int64_t at = first + done - begin;
    const int here = int(std::min<int64_t>(count - done, width - at));
    load_values(product.data[matrix], row * width + at, here, dtype, values + done);
    done += here;
  }
}

inline void finish(const void* args, int part, int parts) {
  const auto& a = static_cast<const FinishArgs*>(args)->rest;
  const Rows& product = static_cast<const FinishArgs*>(args)->product;
  const int64_t width = a.gated ? a.out_features / 2 : a.out_features, all = a.rows;
  alignas(64) float y[kColumns], other[kColumns];
  for (int64_t row = all * part / parts; row < all * (part + 1) / parts; ++row)
    for (int64_t first = 0; first < width; first += kColumns) {
      const int count = int(std::min<int64_t>(kColumns, width - first));
      load_columns(product, row, first, count, a.dtype, y);
      activate(a.activation, y, count);
      if (a.gated) {
        load_columns(product, row, width + first, count, a.dtype, other);
        for (int i = 0; i < count; ++i) y[i] *= other[i];
      }
      if (a.residual) {
        load_values(a.residual, row * a.residual_stride + first, count, a.dtype, other);
        for (int i = 0; i < count; ++i) y[i] += other[i];
      }
      store_values(a.y, row * a.y_stride + first, count, a.dtype, y);
    }
}

}  // namespace river
