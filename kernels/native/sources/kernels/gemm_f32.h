// float32 matmuls of a few rows with weights or keys converted as they are read; one summation order for any rows.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/bf12.h"
#include "kernels/gemm_blocked.h"
#include "kernels/mxfp4.h"

namespace river {

constexpr int kPiece = 32;  // features that are read at a time; rows of float32 are filled up to whole pieces

// Reads vector U of a piece as prepared activations lie: for bfloat16 even and odd features in turn (kEvenOdd).
template <int D, int U>
RIVER_INLINE Floats load_vector(const char* piece) {
  if constexpr (D == kFloat32) return load_floats(reinterpret_cast<const float*>(piece) + U * kLanes);
  if constexpr (D == kFloat16) return load_float16(reinterpret_cast<const uint16_t*>(piece) + U * kLanes);
  if constexpr (D == kBFloat16) {
    const Ints pairs = load(reinterpret_cast<const uint8_t*>(piece) + U / 2 * kLanes * 4);
    return U % 2 ? high_bfloat16(pairs) : low_bfloat16(pairs);
  }
  if constexpr (D == kInt8s) return load_int8(reinterpret_cast<const uint8_t*>(piece) + U * kLanes);
  if constexpr (D == kFloat8s) return load_float8(reinterpret_cast<const uint8_t*>(piece) + U * kLanes);
}

// To and from the order of kEvenOdd; `size` is a multiple of 32.
inline void split(const float* values, int64_t size, float* out) {
  for (int64_t k = 0; k < size; k += 2 * kLanes)
    for (int i = 0; i < kLanes; ++i) {
      out[k + i] = values[k + 2 * i];
      out[k + kLanes + i] = values[k + 2 * i + 1];
    }
}
inline void join(const float* values, int64_t size, float* out) {
  for (int64_t k = 0; k < size; k += 2 * kLanes)
    for (int i = 0; i < kLanes; ++i) {
      out[k + 2 * i] = values[k + i];
      out[k + 2 * i + 1] = values[k + kLanes + i];
    }
}

struct AsTheyAre {
  RIVER_INLINE Floats operator()(Floats values, int, int64_t) const { return values; }
};

// y[r][t] = sum over i < k of rows[t][i] x[r][i]; `fetch(i)` and `scaled(values, row, i)` run for each piece.
template <int R, int T, int D, class Fetch, class Scaled>
RIVER_INLINE void dots_of_tile(const char* const* rows, int64_t k, Matrix<const float> x, Matrix<float> y,
                               const Fetch& fetch, const Scaled& scaled) {
  const int64_t whole = k / kPiece * kPiece;
  Floats sums[R][4];
  unrolled<R>([&](auto r) RIVER_INLINED { unrolled<4>([&](auto t) RIVER_INLINED { sums[r][t] = zeros(); }); });
  const auto add = [&](const auto& piece_of, int64_t i) RIVER_INLINED {
    unrolled<kPiece / kLanes>([&](auto u) RIVER_INLINED {
      unrolled<T>([&](auto t) RIVER_INLINED {
        const Floats values = scaled(load_vector<D, u>(piece_of(t)), t, i);
        unrolled<R>([&](auto r) RIVER_INLINED {
          sums[r][t] = fma(values, load_floats(x.data + i + r * x.stride + u * kLanes), sums[r][t]);
        });
      });
    });
  };
  for (int64_t i = 0; i < whole; i += kPiece) {
    fetch(i);
    add([&](int t) RIVER_INLINED { return rows[t] + i * bytes_of(D); }, i);
  }
  if (whole < k) {
    char last[T][kPiece * bytes_of(D)] = {};
    for (int t = 0; t < T; ++t) std::memcpy(last[t], rows[t] + whole * bytes_of(D), (k - whole) * bytes_of(D));
    add([&](int t) RIVER_INLINED { return last[t]; }, whole);
  }
  unrolled<R>([&](auto r) RIVER_INLINED {
    float total[4];
    sums_of_four(sums[r], total);
    std::copy(total, total + T, y.data + r * y.stride);
  });
}

// The same of `count` rows, in batches that registers hold; `fetch` is called with the batch and their number too.
template <int T, int D, class Fetch, class Scaled = AsTheyAre>
void dots(const char* const* rows, int64_t k, Matrix<const float> x, int count, Matrix<float> y, const Fetch& fetch,
          const Scaled& scaled = {}) {
  in_batches<kMostRows>(count, [&](auto r, int row, int batch, int batches) RIVER_INLINED {
    dots_of_tile<r, T, D>(
        rows, k, {x.data + row * x.stride, x.stride}, {y.data + row * y.stride, y.stride},
        [&](int64_t i) RIVER_INLINED { fetch(i, batch, batches); }, scaled);
  });
}

// Weights of dtype D; activations in format kFloats or, for bfloat16, kEvenOdd.
template <int D>
void microkernel_f32(const GemmArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
  const int64_t padded = a.padded_features(), row_bytes = a.in_features * bytes_of(D);
  const Matrix<const float> x{static_cast<const float*>(a.x.values) + row * padded, padded};
  for_fours(a, n, bytes_of(D), [&](const char* weight, int at, auto t) RIVER_INLINED {
    const char* features[] = {weight, weight + row_bytes, weight + 2 * row_bytes, weight + 3 * row_bytes};
    dots<t, D>(features, a.in_features, x, rows, {y[0] + at, kBlock},
               [&](int64_t i, int batch, int batches) RIVER_INLINED {
                 // (Each batch asks for some of the features that are next.)
                 for (int ahead = t + t * batch / batches; ahead < t + t * (batch + 1) / batches; ++ahead)
                   for (int byte = 0; byte < kPiece * bytes_of(D); byte += 64)
                     __builtin_prefetch(weight + ahead * row_bytes + i * bytes_of(D) + byte, 0, 2);
               });
  });
}

// The same of 8-bit weights, scaled by output feature or by piece. 8-bit floats are read as 16-bit: exponents + 8.
template <int D, bool kGrouped>
void microkernel_8_bits(const GemmArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
  const int64_t k = a.in_features, padded = a.padded_features(), groups = kGrouped ? k / kPiece : 1;
  const Matrix<const float> x{static_cast<const float*>(a.x.values) + row * padded, padded};
  const int count = int(std::min<int64_t>(kBlock, a.epilogue.out_features - n * kBlock));
  const auto some = [&](int at, auto t) RIVER_INLINED {
    const int64_t first = n * kBlock + at;
    const char* weight = reinterpret_cast<const char*>(a.weight) + first * k;
    const char* features[] = {weight, weight + k, weight + 2 * k, weight + 3 * k};
    const float* scale = a.scale + first * groups;
    dots<t, D>(
        features, k, x, rows, {y[0] + at, kBlock},
        [&](int64_t i, int batch, int) RIVER_INLINED {
          if (batch == 0 && i % 64 == 0)
            for (int ahead = t; ahead < 2 * t; ++ahead) __builtin_prefetch(weight + ahead * k + i, 0, 2);
        },
        [&](Floats values, int of, int64_t i) RIVER_INLINED {
          if constexpr (kGrouped) return values * every(scale[of * groups + i / kPiece]);
          return values;
        });
    if constexpr (!kGrouped)
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < t; ++i) y[r][at + i] *= scale[i] * (D == kFloat8s ? 256.0f : 1.0f);
  };
  int at = 0;
  for (; at + 4 <= count; at += 4) some(at, std::integral_constant<int, 4>());
  for (; at < count; ++at) some(at, std::integral_constant<int, 1>());
}

// The same for 12-bit weights.
class MicrokernelF32Bf12 {
 public:
  MicrokernelF32Bf12(const GemmArgs& a, int part, int parts) : blocks_(a, part, parts) {}

  void operator()(const GemmArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) const {
    const int64_t padded = a.padded_features();
    const Matrix<const float> x{static_cast<const float*>(a.x.values) + row * padded, padded};
    const auto few = [&](const UnpackedBlock& block, int four, auto r, Matrix<float> to) RIVER_INLINED {
      dots_of_four<r, kHalves == 1 ? 4 : kMostRows, true>(
          block.four(four), block.palette(), block.in_features(), to,
          [&](Floats sum, Ints weights, int64_t i, int row) RIVER_INLINED {
            const float* at = x.data + row * x.stride + i;
            sum = fma(low_bfloat16(weights), load_floats(at), sum);
            return fma(high_bfloat16(weights), load_floats(at + kLanes), sum);
          },
          [](const Floats(&sums)[kFour], float* total) RIVER_INLINED { sums_of_four(sums, total); });
    };
    const auto many = [&](UnpackedBlock& block, int four, Matrix<float> to) {
      const char* features[kFour];
      for (int t = 0; t < kFour; ++t) features[t] = reinterpret_cast<const char*>(block.row(kFour * four + t));
      dots<kFour, kBFloat16>(features, block.in_features(), x, rows, to,
                             [&](int64_t i, int, int) RIVER_INLINED { block.reach(four, i); });
    };
    blocks_.sum(a, n, rows, y, few, many);
  }

 private:
  mutable Bf12Blocks blocks_;
};

// The same for up to kMostRows rows of MXFP4 weights.
inline void microkernel_f32_mxfp4(const GemmArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
  const int64_t padded = a.padded_features();
  const float* first = static_cast<const float*>(a.x.values) + row * padded;
  for_fours_of_mxfp4(a, n, [&](const Mxfp4Four& four, int at) {
    four.dots(
        rows, {y[0] + at, kBlock},
        [&](Floats sum, Ints weights, int64_t i, int of) RIVER_INLINED {
          const float* x = first + of * padded + i;
          sum = fma(low_bfloat16(weights), load_floats(x), sum);
          return fma(high_bfloat16(weights), load_floats(x + kLanes), sum);
        },
        [](const Floats(&sums)[kFour], float* total) RIVER_INLINED { sums_of_four(sums, total); });
  });
}

inline void gemm_f32(const GemmArgs& a, int part, int parts) {
  constexpr int64_t kBytesTogether = 1 << 18;  // of activations
  const int fit = int(std::max<int64_t>(kBytesTogether / 4 / a.padded_features() / kBlock, 1)) * kBlock;
  const int together = std::min(fit, kRowsTogether);
  if (a.in_8_bits == kFloat8s) return gemm_blocked(a, part, parts, microkernel_8_bits<kFloat8s, false>, together);
  if (a.in_8_bits && a.grouped) return gemm_blocked(a, part, parts, microkernel_8_bits<kInt8s, true>, together);
  if (a.in_8_bits) return gemm_blocked(a, part, parts, microkernel_8_bits<kInt8s, false>, together);
  if (a.palette) return gemm_blocked(a, part, parts, MicrokernelF32Bf12(a, part, parts), together);
  if (a.transposed && a.epilogue.dtype == kBFloat16)
    return gemm_of_columns(
        a, part, parts,
        [&](Floats sum, Ints pairs, const char* x, int64_t k, int lane) RIVER_INLINED {
          const float* const even = reinterpret_cast<const float*>(x) + k + lane;
          sum = fma(low_bfloat16(pairs), every(even[0]), sum);
          return fma(high_bfloat16(pairs), every(even[kLanes]), sum);
        },
        [](const Floats(&sums)[kFour], float* total) RIVER_INLINED { sums_of_four(sums, total); },
        microkernel_f32<kBFloat16>, together);
  if (a.exponents || a.transposed)
    return with_dtype(a.epilogue.dtype, [&](auto d) {
      gemm_of_made_blocks(a, part, parts, microkernel_f32_mxfp4, microkernel_f32<d>, together);
    });
  with_dtype(a.epilogue.dtype, [&](auto d) { gemm_blocked(a, part, parts, microkernel_f32<d>, together); });
}

}  // namespace river
