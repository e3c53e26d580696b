// Tensor values read as float32 and written rounded to nearest, ties to even, in loops that compilers vectorize.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "phases.h"

namespace river {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bfloat16(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

inline float from_float16(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13, sign = uint32_t(x & 0x8000) << 16;
  const bool finite = (x & 0x7c00) != 0x7c00;
  const float scaled = bits_to_float(magnitude) * 0x1p112f;  // exact for subnormal values too
  return bits_to_float((finite ? float_to_bits(scaled) : magnitude | 0x7f800000) | sign);
}

inline uint16_t to_float16(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded value in the lowest bits
    return uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

inline float load_scalar(const void* p, int64_t i, int32_t dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t x = static_cast<const uint16_t*>(p)[i];
  return dtype == kBFloat16 ? from_bfloat16(x) : from_float16(x);
}

inline void load_values(const void* p, int64_t first, int count, int32_t dtype, float* values) {
  const auto* half = static_cast<const uint16_t*>(p) + first;
  if (dtype == kFloat32)
    std::memcpy(values, static_cast<const float*>(p) + first, count * sizeof(float));
  else if (dtype == kBFloat16)
    for (int i = 0; i < count; ++i) values[i] = from_bfloat16(half[i]);
  else
    for (int i = 0; i < count; ++i) values[i] = from_float16(half[i]);
}

// The same, filled up with zeros to `size` values.
inline void load_filled(const void* p, int64_t first, int count, int size, int32_t dtype, float* values) {
  load_values(p, first, count, dtype, values);
  std::fill(values + count, values + size, 0.0f);
}

inline void store_values(void* p, int64_t first, int count, int32_t dtype, const float* values) {
  auto* half = static_cast<uint16_t*>(p) + first;
  if (dtype == kFloat32)
    std::memcpy(static_cast<float*>(p) + first, values, count * sizeof(float));
  else if (dtype == kBFloat16)
    for (int i = 0; i < count; ++i) half[i] = to_bfloat16(values[i]);
  else
    for (int i = 0; i < count; ++i) half[i] = to_float16(values[i]);
}

template <int kColumns>
constexpr int kMostLoaded = kColumns == kBlock ? 16 * kBlock : kColumns;

// How many values such rows are: of a block whole vectors, so that no loop has a remainder.
template <int kColumns>
constexpr int values_of(int rows, int count) {
  return kColumns == kBlock ? rows * kBlock : count;
}

// Reads `count` <= kColumns values of rows `stride` apart, in one loop: compilers do not vectorize a loop over sixteen.
template <int kColumns = kBlock>
void load_block(const void* p, int64_t first, int64_t stride, int rows, int count, int32_t dtype, float* values) {
  uint16_t halves[kMostLoaded<kColumns>] = {};
  for (int r = 0; r < rows; ++r) {
    if (dtype == kFloat32)
      std::memcpy(values + r * kColumns, static_cast<const float*>(p) + first + r * stride, count * sizeof(float));
    else
      std::memcpy(halves + r * kColumns, static_cast<const uint16_t*>(p) + first + r * stride,
                  count * sizeof(uint16_t));
  }
  if (dtype != kFloat32) load_values(halves, 0, values_of<kColumns>(rows, count), dtype, values);
}

// The same the other way round.
template <int kColumns = kBlock>
void store_block(void* p, int64_t first, int64_t stride, int rows, int count, int32_t dtype, const float* values) {
  uint16_t halves[kMostLoaded<kColumns>];
  if (dtype != kFloat32) store_values(halves, 0, values_of<kColumns>(rows, count), dtype, values);
  for (int r = 0; r < rows; ++r) {
    if (dtype == kFloat32)
      std::memcpy(static_cast<float*>(p) + first + r * stride, values + r * kColumns, count * sizeof(float));
    else
      std::memcpy(static_cast<uint16_t*>(p) + first + r * stride, halves + r * kColumns, count * sizeof(uint16_t));
  }
}

constexpr int64_t bytes_of(int32_t dtype) { return dtype == kFloat32 ? 4 : dtype >= kBool ? 1 : 2; }

// Calls f with a tensor's dtype as a constant.
template <class F>
void with_dtype(int32_t dtype, const F& f) {
  if (dtype == kFloat32) return f(std::integral_constant<int, kFloat32>());
  if (dtype == kBFloat16) return f(std::integral_constant<int, kBFloat16>());
  f(std::integral_constant<int, kFloat16>());
}

}  // namespace river
