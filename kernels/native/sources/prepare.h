// Activations as products read them: rounded to int8 with one scale for each group, or in the order of the nibbles.
// Written as plain loops over one group, which compilers vectorize.
#pragma once

#include <algorithm>

#include "phases.h"
#include "scalars.h"

namespace river {

constexpr int kLargestGroup = 128;

// Reads the group that starts at feature `first` as float32; what lies beyond K is zero.
inline void load_group(const PrepareArgs& a, int64_t row, int64_t first, float* values) {
  const int count = int(std::min<int64_t>(a.group_size, a.in_features - first));
  const int64_t at = row * a.x_stride + first;
  const auto* half = static_cast<const uint16_t*>(a.x) + at;
  if (a.dtype == kFloat32)
    std::memcpy(values, static_cast<const float*>(a.x) + at, count * sizeof(float));
  else if (a.dtype == kBFloat16)
    for (int i = 0; i < count; ++i) values[i] = from_bfloat16(half[i]);
  else
    for (int i = 0; i < count; ++i) values[i] = from_float16(half[i]);
  std::fill(values + count, values + a.group_size, 0.0f);
}

inline float sum_of(const float* values, int size) {
  float lanes[16] = {};
  for (int i = 0; i < size; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += values[i + j];
  for (int half = 8; half; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

// The largest magnitude; NaN where there is one, as its bits exceed those of infinity.
inline float largest_of(const float* values, int size) {
  uint32_t largest = 0;
  for (int i = 0; i < size; ++i) largest = std::max(largest, float_to_bits(values[i]) & 0x7fffffffu);
  return bits_to_float(largest);
}

// Rounds a group to -127..127 times its scale. Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
inline void round_group(const float* values, int size, int8_t* out, float* scale, int32_t* start) {
  const float largest = largest_of(values, size);
  const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
  int32_t total = 0;
  for (int i = 0; i < size; ++i) {
    const int32_t rounded = int32_t(float_to_bits(values[i] * inverse + 12582912.0f)) - 0x4b400000;
    out[i] = int8_t(rounded);
    total += int8_t(rounded);
  }
  *scale = largest / 127.0f;
  *start = -8 * total;
}

// Nibble j of a packed lane holds feature order[j] of its eight.
constexpr int kNibbleOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};

inline void prepare(const void* args, int part, int parts) {
  const auto& a = *static_cast<const PrepareArgs*>(args);
  const int64_t size = a.group_size, groups = (a.in_features + size - 1) / size, all = groups * a.rows;
  alignas(64) float values[kLargestGroup];
  for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i) {
    load_group(a, i / groups, i % groups * size, values);
    a.out.sum[i] = sum_of(values, size);
    if (a.out.format == kInt8) {
      round_group(values, size, static_cast<int8_t*>(a.out.values) + i * size, a.out.scale + i, a.out.start + i);
    } else {
      float* out = static_cast<float*>(a.out.values) + i * size;
      for (int64_t k = 0; k < size; ++k) out[k] = values[k / 8 * 8 + kNibbleOrder[k % 8]];
    }
  }
}

}  // namespace river
