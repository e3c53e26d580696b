// Products with 16-bit or float32 weights, converted to float32 as they are read, once for a few rows. Every output is
// summed in one order, whatever the number of rows.
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

constexpr int kPiece = 32;  // input features that are read at a time

// Reads vector number U of a piece of weights, in the order of prepared activations: of bfloat16 those with even numbers
// and those with odd ones in turn (kSplit), which takes one instruction each.
template <int D, int U>
RIVER_INLINE Floats load_weights(const char* piece) {
  if constexpr (D == kFloat32) return load_floats(reinterpret_cast<const float*>(piece) + U * kLanes);
  if constexpr (D == kFloat16) return load_float16(reinterpret_cast<const uint16_t*>(piece) + U * kLanes);
  if constexpr (D == kBFloat16) {
    const Ints pairs = load(reinterpret_cast<const uint8_t*>(piece) + U / 2 * kLanes * 4);
    return U % 2 ? high_bfloat16(pairs) : low_bfloat16(pairs);
  }
}

// Which of the features that are next a tile asks for.
struct Ahead {
  int first, end;
};

// `T` output features for R rows: y[r][t] = sum over k of weight[t, k] x[r, k].
template <int R, int T, int D>
RIVER_INLINE void dense_tile(const LinearArgs& a, const char* weight, const float* x, Ahead next, float (*y)[kBlock]) {
  constexpr int kBytes = D == kFloat32 ? 4 : 2;
  const int64_t k = a.in_features, whole = k / kPiece * kPiece, padded = padded_features(a);
  Floats sums[R][4];
  unrolled<R>([&](auto r) RIVER_INLINED { unrolled<4>([&](auto t) RIVER_INLINED { sums[r][t] = zeros(); }); });
  const auto add = [&](const char* w, int64_t stride, const float* x) RIVER_INLINED {
    unrolled<kPiece / kLanes>([&](auto u) RIVER_INLINED {
      unrolled<T>([&](auto t) RIVER_INLINED {
        const Floats values = load_weights<D, u>(w + t * stride);
        unrolled<R>([&](auto r) RIVER_INLINED {
          sums[r][t] = fma(values, load_floats(x + r * padded + u * kLanes), sums[r][t]);
        });
      });
    });
  };
  for (int64_t i = 0; i < whole; i += kPiece) {
    for (int t = T + next.first; t < T + next.end; ++t)
      for (int byte = 0; byte < kPiece * kBytes; byte += 64) __builtin_prefetch(weight + (t * k + i) * kBytes + byte, 0, 2);
    add(weight + i * kBytes, k * kBytes, x + i);
  }
  if (whole < k) {
    char last[T][kPiece * kBytes] = {};
    for (int t = 0; t < T; ++t) std::memcpy(last[t], weight + (t * k + whole) * kBytes, (k - whole) * kBytes);
    add(last[0], sizeof last[0], x + whole);
  }
  unrolled<R>([&](auto r) RIVER_INLINED {
    float total[4];
    sums_of_four(sums[r], total);
    std::copy(total, total + T, y[r]);
  });
}

// The same for up to 16 rows, in shares of as many as registers hold.
template <int T, int D>
void dense_tiles(const LinearArgs& a, const char* weight, const float* x, int rows, float (*y)[kBlock]) {
  const int64_t padded = padded_features(a);
  const int shares = (rows + kMostRows - 1) / kMostRows;
  for (int share = 0, row = 0, next; share < shares; ++share, row = next) {
    next = rows * (share + 1) / shares;
    const Ahead ahead{T * share / shares, T * (share + 1) / shares};
    unrolled<kMostRows>([&](auto r) RIVER_INLINED {
      if (r + 1 == next - row) dense_tile<r + 1, T, D>(a, weight, x + row * padded, ahead, y + row);
    });
  }
}

// One block of output features for `rows` <= 16 rows of activations in float32, in format kPlain or, for bfloat16, kSplit.
template <int D>
void dense_block(const LinearArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
  const auto* x = static_cast<const float*>(a.x.values) + row * padded_features(a);
  for_fours(a, n, D == kFloat32 ? 4 : 2, [&](const char* weight, int at, auto t) RIVER_INLINED {
    dense_tiles<t, D>(a, weight, x, rows, reinterpret_cast<float(*)[kBlock]>(y[0] + at));
  });
}

}  // namespace river
