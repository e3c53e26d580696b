// Products with 16-bit or float32 weights of a few rows, which read each weight once and sum every output in one order.
#pragma once

#include "functions.h"
#include "phases.h"
#include "scalars.h"
#include "vectors.h"

namespace river {

// Input features rounded up to whole groups, as prepared activations lie.
inline int64_t padded_features(const LinearArgs& a) {
  return (a.in_features + a.group_size - 1) / a.group_size * a.group_size;
}

inline int matrix_of(const Rows& rows, int64_t row) {
  int matrix = 0;
  while (row >= rows.first[matrix + 1]) ++matrix;
  return matrix;
}

// Reads kLanes values of a dtype from `i` on.
template <int D>
RIVER_INLINE Floats load_weights(const void* p, int64_t i) {
  if constexpr (D == kFloat32) return load_floats(static_cast<const float*>(p) + i);
  if constexpr (D == kBFloat16) return load_bfloat16(static_cast<const uint16_t*>(p) + i);
  if constexpr (D == kFloat16) {
    float values[kLanes];
    load_values(p, i, kLanes, kFloat16, values);
    return load_floats(values);
  }
}

// `T` output features for R rows: y[r][at + t] = sum over k of weight[t, k] x[r, k].
template <int R, int T, int D>
RIVER_INLINE void dense_tile(const LinearArgs& a, const char* weight, const float* const* x, float (*y)[kBlock],
                             int at) {
  const int64_t k = a.in_features, whole = k / kLanes * kLanes, bytes = D == kFloat32 ? 4 : 2;
  Floats sums[T][R];
  unrolled<T>([&](auto t) RIVER_INLINED { unrolled<R>([&](auto r) RIVER_INLINED { sums[t][r] = zeros(); }); });
  for (int64_t i = 0; i < whole; i += kLanes) {
    unrolled<T>([&](auto t) RIVER_INLINED {
      const Floats w = load_weights<D>(weight + t * k * bytes, i);
      __builtin_prefetch(weight + (t + T) * k * bytes + i * bytes, 0, 2);
      unrolled<R>([&](auto r) RIVER_INLINED { sums[t][r] = fma(w, load_floats(x[r] + i), sums[t][r]); });
    });
  }
  unrolled<T>([&](auto t) RIVER_INLINED {
    float last[kLanes] = {};
    load_values(weight + t * k * bytes, whole, int(k - whole), D, last);
    unrolled<R>([&](auto r) RIVER_INLINED {
      y[r][at + t] = sum_of(whole < k ? fma(load_floats(last), load_floats(x[r] + whole), sums[t][r]) : sums[t][r]);
    });
  });
}

// One block of output features for `rows` <= R rows of activations in float32, rows filled up to whole groups.
template <int R, int D>
void dense_block(const LinearArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
  const int64_t padded = padded_features(a);
  const float* x[R];
  for (int r = 0; r < R; ++r)
    x[r] = static_cast<const float*>(a.x.values) + (row + std::min(r, rows - 1)) * padded;
  const int64_t first = n * kBlock;
  const int count = int(std::min<int64_t>(kBlock, a.out_features - first));
  constexpr int kTile = R > 4 ? 2 : 4;
  for (int i = 0; i < count;) {
    const int matrix = matrix_of(a.dense, first + i);
    const int64_t row_bytes = a.in_features * (D == kFloat32 ? 4 : 2), at = first + i - a.dense.first[matrix];
    const char* weight = static_cast<const char*>(a.dense.data[matrix]) + at * row_bytes;
    if (i + kTile <= count && first + i + kTile <= a.dense.first[matrix + 1]) {
      dense_tile<R, kTile, D>(a, weight, x, y, i);
      i += kTile;
    } else {
      dense_tile<R, 1, D>(a, weight, x, y, i);
      ++i;
    }
  }
}

}  // namespace river
