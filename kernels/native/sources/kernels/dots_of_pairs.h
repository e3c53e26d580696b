// Dot products of rows of bfloat16, by pairs (AVX-512 BF16, ARM's BF16); one summation order for any number of rows.
#pragma once

#include <algorithm>

#include "phases.h"
#include "vectors/vectors.h"

namespace river {

constexpr int kTurn = 32, kPairs = 2 * kLanes;  // input features of a turn, and of a vector

// y[r][t] = sum over k of w[t, k] x[r, k], w[t, 0] at `row_of(t)`, for R rows and T <= 4; `fetch(k)` runs for each
// turn.
template <int R, int T, class RowOf, class Fetch>
RIVER_INLINE void dots_of_pairs(const RowOf& row_of, int64_t k, const char* first_x, int64_t row_bytes, Matrix<float> y,
                                const Fetch& fetch) {
  const int64_t whole = k / kTurn * kTurn;
  Floats sums[R][4] = {};
  const auto add = [&](int64_t i, const auto& load_weights) RIVER_INLINED {
    unrolled<T>([&](auto t) RIVER_INLINED {
      const Ints w = load_weights(reinterpret_cast<const uint8_t*>(row_of(t) + i * 2));
      unrolled<R>([&](auto r) RIVER_INLINED {
        const auto* x = reinterpret_cast<const uint8_t*>(first_x + r * row_bytes + i * 2);
        sums[r][t] = dot_pairs(sums[r][t], w, load(x));
      });
    });
  };
  for (int64_t i = 0; i < whole; i += kTurn) {
    fetch(i);
    unrolled<kTurn / kPairs>(
        [&](auto v) RIVER_INLINED { add(i + v * kPairs, [](const uint8_t* w) RIVER_INLINED { return load(w); }); });
  }
  for (int64_t i = whole; i < k; i += kPairs)
    add(i, [&](const uint8_t* w) RIVER_INLINED { return load_some(w, std::min<int64_t>(kPairs, k - i)); });
  unrolled<R>([&](auto r) RIVER_INLINED {
    float total[4];
    sums_of_pairs(sums[r], total);
    std::copy(total, total + T, y.data + r * y.stride);
  });
}

}  // namespace river
