// Products with 16-bit or float32 weights, converted to float32 as they are read, once for a few rows. Every output is
// summed in one order, whatever the number of rows.
#pragma once

#include "dots.h"
#include "phases.h"

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

// Calls f(weights, number within the block, how many) for the features of block `n`, by fours where they belong to one
// matrix, else one by one.
template <class F>
RIVER_INLINE void for_fours(const LinearArgs& a, int64_t n, int64_t bytes, const F& f) {
  const int64_t first = n * kBlock;
  const int count = int(std::min<int64_t>(kBlock, a.out_features - first));
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

// One block of output features for `rows` <= 16 rows of activations in float32, in format kPlain or, for bfloat16,
// kSplit.
template <int D>
void dense_block(const LinearArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
  const int64_t padded = padded_features(a), row_bytes = a.in_features * bytes_of(D);
  const Matrix<const float> x{static_cast<const float*>(a.x.values) + row * padded, padded};
  for_fours(a, n, bytes_of(D), [&](const char* weight, int at, auto t) RIVER_INLINED {
    const char* features[] = {weight, weight + row_bytes, weight + 2 * row_bytes, weight + 3 * row_bytes};
    dots<t, D>(features, a.in_features, x, rows, {y[0] + at, kBlock},
               [&](int64_t i, int share, int shares) RIVER_INLINED {
                 // (Each share asks for some of the features that are next.)
                 for (int ahead = t + t * share / shares; ahead < t + t * (share + 1) / shares; ++ahead)
                   for (int byte = 0; byte < kPiece * bytes_of(D); byte += 64)
                     __builtin_prefetch(weight + ahead * row_bytes + i * bytes_of(D) + byte, 0, 2);
               });
  });
}

}  // namespace river
