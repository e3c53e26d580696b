// Activations as matmuls read them: normalised, then int8 with a scale for each group, or another weight's format.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/gemm_f32.h"

namespace river {

// Reads the group that starts at feature `first` of a row as float32; what lies beyond K is zero.
inline void load_group(const PrepareArgs& a, const void* x, int64_t row_start, int64_t first, float* values) {
  const int count = int(std::min<int64_t>(a.group_size, a.in_features - first));
  load_filled(x, row_start + first, count, a.group_size, a.dtype, values);
}

// A norm of one row: (x - shift) * factor, times the weight, plus the bias.
struct Moments {
  float shift = 0, factor = 1;
};

inline Moments moments_of(const PrepareArgs& a, int64_t row) {
  alignas(64) float values[kLargestGroup];
  Moments moments;
  const int64_t at = row * a.x.stride, size = a.group_size;
  if (a.norm == kLayerNorm) {
    float total = 0;
    for (int64_t first = 0; first < a.in_features; first += size) {
      load_group(a, a.x.data, at, first, values);
      total += sum_of(values, int(size));
    }
    moments.shift = total / float(a.in_features);
  }
  float squares = 0;
  for (int64_t first = 0; first < a.in_features; first += size) {
    load_group(a, a.x.data, at, first, values);
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

inline void write_group(const PrepareArgs& a, int64_t row, int64_t first, float* values) {
  alignas(64) float residual[kLargestGroup];
  const int count = int(std::min<int64_t>(a.group_size, a.in_features - first));
  if (a.residual.data) {
    load_group(a, a.residual.data, row * a.residual.stride, first, residual);
    for (int i = 0; i < count; ++i) values[i] += residual[i];
  }
  store_values(a.out.values, row * a.in_features + first, count, a.dtype, values);
}

// Format kAmxTiles of at most 16 rows.
inline void write_pairs(const PrepareArgs& a, int64_t i, const float* values) {
  const int64_t group = i % a.groups(), row = i / a.groups();
  uint16_t rounded[kLargestGroup];
  store_values(rounded, 0, a.group_size, kBFloat16, values);
  char* out = static_cast<char*>(a.out.values) + (group * a.group_size / 2 * a.rows + row) * 4;
  for (int k = 0; k < a.group_size; k += 2, out += 4 * a.rows) std::memcpy(out, rounded + k, 4);
}

inline void write_prepared(const PrepareArgs& a, int64_t i, float* values) {
  const int64_t size = a.group_size;
  float* const floats = static_cast<float*>(a.out.values) + i * size;
  switch (a.out.format) {
    case kFloats: std::copy(values, values + size, floats); return;
    case kEvenOdd: return split(values, size, floats);
    case kBFloat16Rows: return store_values(a.out.values, i * size, int(size), kBFloat16, values);
    case kAmxTiles: return write_pairs(a, i, values);
    case kUnchanged: return write_group(a, i / a.groups(), i % a.groups() * size, values);
  }
  a.out.sum[i] = sum_of(values, int(size));
  round_group(values, int(size), static_cast<int8_t*>(a.out.values) + i * size, a.out.scale + i, a.out.start + i);
}

// Format kAmxTiles of more than 16 rows. Parts split the blocks of rows.
inline void prepare_blocks(const PrepareArgs& a, int part, int parts) {
  const int64_t size = a.group_size, groups = a.groups();
  alignas(64) float values[kLargestGroup];
  alignas(64) uint16_t rounded[kBlock][kLargestGroup] = {};
  Moments moments[kBlock];
  for (auto [block, end] = share_of(ceil_div(a.rows, kBlock), part, parts); block < end; ++block) {
    const int64_t row = block * kBlock;
    const int rows = int(std::min<int64_t>(kBlock, a.rows - row));
    for (int r = 0; a.norm && r < rows; ++r) moments[r] = moments_of(a, row + r);
    for (int64_t group = 0; group < groups; ++group) {
      for (int r = 0; r < rows; ++r) {
        load_group(a, a.x.data, (row + r) * a.x.stride, group * size, values);
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
  if (a.out.format == kAmxTiles && a.rows > kBlock) return prepare_blocks(a, part, parts);
  const int64_t size = a.group_size, groups = a.groups(), together = a.norm ? groups : 1;
  const Share share = share_of(groups * a.rows / together, part, parts);
  alignas(64) float values[kLargestGroup];
  Moments moments;
  for (int64_t i = share.first * together; i < share.end * together; ++i) {
    const int64_t row = a.order ? a.order[i / groups] / a.each : i / groups, first = i % groups * size;
    if (a.norm && first == 0) moments = moments_of(a, row);
    load_group(a, a.x.data, row * a.x.stride, first, values);
    if (a.norm) normalise(a, moments, first, values);
    write_prepared(a, i, values);
  }
}

}  // namespace river
