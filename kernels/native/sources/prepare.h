// Activations as products read them: normalised, then rounded to int8 with one scale for each group, or in the order
// that other weights ask for. Written as plain loops over one group, which compilers vectorize.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "functions.h"
#include "phases.h"
#include "scalars.h"
#include "transpose.h"

namespace river {

// Reads the group that starts at feature `first` of a row as float32; what lies beyond K is zero.
inline void load_group(const PrepareArgs& a, const void* x, int64_t row_start, int64_t first, float* values) {
  const int count = int(std::min<int64_t>(a.group_size, a.in_features - first));
  load_values(x, row_start + first, count, a.dtype, values);
  std::fill(values + count, values + a.group_size, 0.0f);
}

// A norm of one row: (x - shift) * factor, times the weight, plus the bias.
struct Moments {
  float shift = 0, factor = 1;
};

inline Moments moments_of(const PrepareArgs& a, int64_t row) {
  alignas(64) float values[kLargestGroup];
  Moments moments;
  const int64_t at = row * a.x_stride, size = a.group_size;
  if (a.norm == kLayerNorm) {
    float total = 0;
    for (int64_t first = 0; first < a.in_features; first += size) {
      load_group(a, a.x, at, first, values);
      total += sum_of(values, int(size));
    }
    moments.shift = total / float(a.in_features);
  }
  float squares = 0;
  for (int64_t first = 0; first < a.in_features; first += size) {
    load_group(a, a.x, at, first, values);
    const int count = int(std::min<int64_t>(size, a.in_features - first));
    for (int i = 0; i < count; ++i) values[i] -= moments.shift;
    squares += dot_of(values, values, int(size));
  }
  moments.factor = 1.0f / std::sqrt(squares / float(a.in_features) + a.eps);
  return moments;
}

inline void normalise(const PrepareArgs& a, const Moments& moments, int64_t first, float* values) {
  alignas(64) float weight[kLargestGroup];
  const int size = a.group_size, count = int(std::min<int64_t>(size, a.in_features - first));
  const float plus = a.norm == kRmsPlusOne ? 1.0f : 0.0f;
  load_group(a, a.norm_weight, 0, first, weight);
  for (int i = 0; i < count; ++i) values[i] = (values[i] - moments.shift) * moments.factor * (weight[i] + plus);
  if (!a.norm_bias) return;
  load_group(a, a.norm_bias, 0, first, weight);
  for (int i = 0; i < count; ++i) values[i] += weight[i];
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

// Writes a group as x lies, plus the residual.
inline void write_group(const PrepareArgs& a, int64_t row, int64_t first, float* values) {
  alignas(64) float residual[kLargestGroup];
  const int count = int(std::min<int64_t>(a.group_size, a.in_features - first));
  if (a.residual) {
    load_group(a, a.residual, row * a.residual_stride, first, residual);
    for (int i = 0; i < count; ++i) values[i] += residual[i];
  }
  store_values(a.out.values, row * a.in_features + first, count, a.dtype, values);
}

// Format kTiled of at most 16 rows.
inline void write_pairs(const PrepareArgs& a, int64_t i, const float* values) {
  const int64_t groups = (a.in_features + a.group_size - 1) / a.group_size, row = i / groups;
  uint16_t rounded[kLargestGroup];
  store_values(rounded, 0, a.group_size, kBFloat16, values);
  char* out = static_cast<char*>(a.out.values) + (i % groups * a.group_size / 2 * a.rows + row) * 4;
  for (int k = 0; k < a.group_size; k += 2, out += 4 * a.rows) std::memcpy(out, rounded + k, 4);
}

inline void prepare_group(const PrepareArgs& a, int64_t i, const float* values) {
  const int64_t size = a.group_size;
  if (a.out.format == kPlain) {
    std::copy(values, values + size, static_cast<float*>(a.out.values) + i * size);
    return;
  }
  if (a.out.format == kSplit) return split(values, size, static_cast<float*>(a.out.values) + i * size);
  if (a.out.format == kTiled) return write_pairs(a, i, values);
  if (a.out.format == kPairs) return store_values(a.out.values, i * size, int(size), kBFloat16, values);
  a.out.sum[i] = sum_of(values, int(size));
  round_group(values, int(size), static_cast<int8_t*>(a.out.values) + i * size, a.out.scale + i, a.out.start + i);
}

// Format kTiled of more than 16 rows. Parts split the blocks of rows.
inline void prepare_blocks(const PrepareArgs& a, int part, int parts) {
  const int64_t size = a.group_size, groups = (a.in_features + size - 1) / size;
  const int64_t blocks = (a.rows + kBlock - 1) / kBlock;
  alignas(64) float values[kLargestGroup];
  alignas(64) uint16_t rounded[kBlock][kLargestGroup] = {};
  Moments moments[kBlock];
  for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
    const int64_t row = block * kBlock;
    const int rows = int(std::min<int64_t>(kBlock, a.rows - row));
    for (int r = 0; a.norm && r < rows; ++r) moments[r] = moments_of(a, row + r);
    for (int64_t group = 0; group < groups; ++group) {
      for (int r = 0; r < rows; ++r) {
        load_group(a, a.x, (row + r) * a.x_stride, group * size, values);
        if (a.norm) normalise(a, moments[r], group * size, values);
        store_values(rounded[r], 0, int(size), kBFloat16, values);
      }
      auto* out = static_cast<uint16_t*>(a.out.values) + (block * groups + group) * size * kBlock;
      for (int64_t k = 0; k < size; k += 32) transpose(rounded[0] + k, kLargestGroup / 2, out + k * kBlock);
    }
  }
}

inline void prepare(const void* args, int part, int parts) {
  const auto& a = *static_cast<const PrepareArgs*>(args);
  if (a.out.format == kTiled && a.rows > kBlock) return prepare_blocks(a, part, parts);
  const int64_t size = a.group_size, groups = (a.in_features + size - 1) / size;
  const int64_t together = a.norm ? groups : 1, all = groups * a.rows / together;
  alignas(64) float values[kLargestGroup];
  Moments moments;
  for (int64_t i = all * part / parts * together; i < all * (part + 1) / parts * together; ++i) {
    const int64_t row = i / groups, first = i % groups * size;
    if (a.norm && first == 0) moments = moments_of(a, row);
    load_group(a, a.x, row * a.x_stride, first, values);
    if (a.norm) normalise(a, moments, first, values);
    if (a.out.format == kAsGiven)
      write_group(a, row, first, values);
    else
      prepare_group(a, i, values);
  }
}

}  // namespace river
