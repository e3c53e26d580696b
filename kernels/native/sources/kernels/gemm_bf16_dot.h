// bfloat16 matmuls by dot products of pairs (AVX-512 BF16, ARM's BF16), some rows at a time; one summation order for
// any rows.
#pragma once

#include <algorithm>

#include "kernels/bf12.h"
#include "kernels/dots_of_pairs.h"
#include "kernels/gemm_blocked.h"
#include "kernels/mxfp4.h"

namespace river {

// y[r][t] = sum over k of weight[t, k] x[row + r, k] of `rows` rows and T <= 4 features; `fetch(k)` runs for each turn.
template <int T, class Fetch>
void dots_of_rows(const GemmArgs& a, int64_t k, const char* weight, int row, int rows, Matrix<float> y,
                  const Fetch& fetch) {
  const int64_t row_bytes = a.padded_features() * 2;
  const char* x = static_cast<const char*>(a.x.values) + row * row_bytes;
  in_batches<kMostRows>(rows, [&](auto r, int first, int, int) {
    dots_of_pairs<r, T>([&](auto t) RIVER_INLINED { return weight + t * k * 2; }, k, x + first * row_bytes, row_bytes,
                        {y.data + first * y.stride, y.stride}, fetch);
  });
}

// Whether one row takes features one by one, not by fours. The processor's own prefetching follows one stream in a
// page, which shorter features share. With shorter vectors, products would wait for each other's sums.
inline bool one_by_one(int64_t k, int rows) { return kPairs == kTurn && rows == 1 && k * 2 <= 4096; }

inline void microkernel_bf16_dot(const GemmArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
  const int64_t k = a.in_features, row_bytes = a.padded_features() * 2;
  const char* x = static_cast<const char*>(a.x.values) + row * row_bytes;
  for_fours(a, n, 2, [&](const char* weight, int at, auto t) {
    if (one_by_one(k, rows)) {
      for (int end = at + t; at < end; ++at, weight += k * 2)
        dots_of_pairs<1, 1>([&](auto) RIVER_INLINED { return weight; }, k, x, row_bytes, {y[0] + at, kBlock},
                            [&](int64_t i) RIVER_INLINED { fetch(reinterpret_cast<const uint8_t*>(weight) + i * 2); });
      return;
    }
    dots_of_rows<t>(a, k, weight, row, rows, {y[0] + at, kBlock}, [&](int64_t i) RIVER_INLINED {
      for (int ahead = t; ahead < 2 * t; ++ahead) __builtin_prefetch(weight + (ahead * k + i) * 2, 0, 2);
    });
  });
}

// The same for up to kMostRows rows of MXFP4 weights.
inline void microkernel_bf16_dot_mxfp4(const GemmArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
  const int64_t row_bytes = a.padded_features() * 2;
  const uint8_t* x = static_cast<const uint8_t*>(a.x.values) + row * row_bytes;
  for_fours_of_mxfp4(a, n, [&](const Mxfp4Four& four, int at) {
    four.dots(
        rows, {y[0] + at, kBlock},
        [&](Floats sum, Ints weights, int64_t i, int of)
            RIVER_INLINED { return dot_pairs(sum, weights, load(x + of * row_bytes + i * 2)); },
        [](const Floats(&sums)[kFour], float* total) RIVER_INLINED { sums_of_pairs(sums, total); });
  });
}

inline void gemm_bf16_dot(const GemmArgs& a, int part, int parts) {
  if (a.exponents) return gemm_of_made_blocks(a, part, parts, microkernel_bf16_dot_mxfp4, microkernel_bf16_dot);
  if (a.transposed)
    return gemm_of_columns(
        a, part, parts,
        [&](Floats sum, Ints pairs, const char* x, int64_t k, int lane)
            RIVER_INLINED { return dot_pairs(sum, pairs, every(reinterpret_cast<const int32_t*>(x)[k / 2 + lane])); },
        [](const Floats(&sums)[kFour], float* total) RIVER_INLINED { sums_of_pairs(sums, total); },
        microkernel_bf16_dot);
  if (!a.palette) return gemm_blocked(a, part, parts, microkernel_bf16_dot);
  Bf12Blocks blocks(a, part, parts);
  gemm_blocked(a, part, parts, [&](const GemmArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
    const int64_t row_bytes = a.padded_features() * 2;
    const char* x = static_cast<const char*>(a.x.values) + row * row_bytes;
    const auto few = [&](const UnpackedBlock& block, int four, auto r, Matrix<float> to) RIVER_INLINED {
      dots_of_four<r, kMostRows, false>(  // (GCC 12 puts what two of these products share on the stack.)
          block.four(four), block.palette(), block.in_features(), to,
          [&](Floats sum, Ints weights, int64_t i, int row) RIVER_INLINED {
            return dot_pairs(sum, weights, load(reinterpret_cast<const uint8_t*>(x + row * row_bytes + i * 2)));
          },
          [](const Floats(&sums)[kFour], float* total) RIVER_INLINED { sums_of_pairs(sums, total); });
    };
    const auto many = [&](UnpackedBlock& block, int four, Matrix<float> to) {
      const char* weight = reinterpret_cast<const char*>(block.row(kFour * four));
      dots_of_rows<kFour>(a, block.in_features(), weight, row, rows, to,
                          [&](int64_t i) RIVER_INLINED { block.reach(four, i); });
    };
    blocks.sum(a, n, rows, y, few, many);
  });
}

}  // namespace river
