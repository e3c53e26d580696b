// Activations that checks hand to matmuls: their memory, and what rounding to 8 bits makes of them.
#pragma once

#include "harness.h"

namespace river::checks {

constexpr double kSumError = 2e-5;  // of a sum in float32, relative to the sum of magnitudes

inline int64_t padded_of(int64_t k, int64_t group) { return ceil_div(k, group) * group; }

// Memory for activations of a format, exactly as much as it takes.
inline Activations activations_of(Case& c, int64_t rows, int64_t k, int64_t group, int32_t format) {
  const int64_t groups = rows * ceil_div(k, group);
  const int64_t element = format == kInt8 ? 1 : format == kBFloat16Rows || format == kAmxTiles ? 2 : 4;
  const int64_t whole = format == kAmxTiles && rows > kBlock ? ceil_div(rows, int64_t(kBlock)) * kBlock : rows;
  Activations x{};
  x.values = c.workspace(whole * padded_of(k, group) * element).data();
  x.scale = c.workspace(groups * 4).data<float>();
  x.sum = c.workspace(groups * 4).data<float>();
  x.start = c.workspace(groups * 4).data<int32_t>();
  x.format = format;
  return x;
}

// The values of rows [rows, k] that lie `stride` apart.
inline Doubles doubles_of(const Strided& x, int64_t rows, int64_t k, int32_t dtype) {
  Doubles values(rows * k);
  for (int64_t i = 0; i < rows * k; ++i) values[i] = value_of(x.data, i / k * x.stride + i % k, dtype);
  return values;
}

// Rounds rows to 8 bits with a scale for each group, by the float32 operations that the kernels name.
inline Doubles in_8_bits(const Doubles& x, int64_t k, int64_t group) {
  Doubles rounded(x.size());
  for (size_t row = 0; row < x.size(); row += k)
    for (int64_t first = 0; first < k; first += group) {
      const int64_t end = std::min(first + group, k);
      float largest = 0;
      for (int64_t i = first; i < end; ++i) largest = std::max(largest, std::fabs(float(x[row + i])));
      const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
      for (int64_t i = first; i < end; ++i)
        rounded[row + i] = std::nearbyint(float(x[row + i]) * inverse) * double(largest / 127.0f);
    }
  return rounded;
}

}  // namespace river::checks
