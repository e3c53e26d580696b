// The numbers of the dtypes of phases.h as doubles, and seeded random ones. Conversions are written apart from those
// of the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>

#include "phases.h"

namespace river::checks {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int32_t kFloatDtypes[] = {kFloat32, kBFloat16, kFloat16};

inline int64_t size_of(int32_t dtype) { return dtype == kFloat32 ? 4 : dtype >= kBool ? 1 : 2; }
inline const char* name_of(int32_t dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "bool", "int8", "float8"};
  return kNames[dtype];
}

// The largest relative error of one rounding, and the largest absolute one of a subnormal result.
inline double rounding_of(int32_t dtype) { return dtype == kFloat32 ? 0x1p-24 : dtype == kBFloat16 ? 0x1p-8 : 0x1p-11; }
inline double tiny_of(int32_t dtype) { return dtype == kFloat16 ? 0x1p-24 : 1e-37; }

inline double from_float_bits(int sign, int exponent, int fraction, int fraction_bits, int bias) {
  const int implied = exponent ? 1 << fraction_bits : 0;
  const double magnitude = std::ldexp(fraction | implied, (exponent ? exponent : 1) - bias - fraction_bits);
  return sign ? -magnitude : magnitude;
}

inline double half_value(uint16_t x) {
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  if (exponent == 31) return fraction ? kNaN : x >> 15 ? -kInfinity : kInfinity;
  return from_float_bits(x >> 15, exponent, fraction, 10, 15);
}

// The 8-bit floats e4m3fn, whose largest exponent is a number but for all bits set.
inline double float8_value(uint8_t x) {
  return (x & 127) == 127 ? kNaN : from_float_bits(x >> 7, x >> 3 & 15, x & 7, 3, 7);
}

inline double bfloat16_value(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t bfloat16_bits(double value) {
  const float single = float(value);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  if (std::isnan(value)) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t half_bits(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  if (value == 0) return sign;
  if (std::fabs(value) >= 65520) return sign | 0x7c00;
  int exponent;
  std::frexp(value, &exponent);
  exponent = std::max(exponent, -13);
  const auto units = int(std::nearbyint(std::ldexp(std::fabs(value), 11 - exponent)));  // at most 2048
  return uint16_t(sign | ((exponent + 13) * 1024 + units));  // (the implied bit adds one to the exponent)
}

inline double value_of(const void* data, int64_t i, int32_t dtype) {
  switch (dtype) {
    case kFloat32: return static_cast<const float*>(data)[i];
    case kBFloat16: return bfloat16_value(static_cast<const uint16_t*>(data)[i]);
    case kFloat16: return half_value(static_cast<const uint16_t*>(data)[i]);
    case kInt8s: return static_cast<const int8_t*>(data)[i];
    case kFloat8s: return float8_value(static_cast<const uint8_t*>(data)[i]);
    default: return static_cast<const uint8_t*>(data)[i];
  }
}

inline void set_value(void* data, int64_t i, int32_t dtype, double value) {
  switch (dtype) {
    case kFloat32: static_cast<float*>(data)[i] = float(value); return;
    case kBFloat16: static_cast<uint16_t*>(data)[i] = bfloat16_bits(value); return;
    case kFloat16: static_cast<uint16_t*>(data)[i] = half_bits(value); return;
    default: static_cast<uint8_t*>(data)[i] = uint8_t(int(value));
  }
}

// Draws the same numbers on every machine.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  int between(int least, int most) { return least + int(engine_() % uint32_t(most - least + 1)); }
  bool one_in(int count) { return between(1, count) == 1; }
  double uniform() { return (engine_() + 0.5) / 0x1p32; }
  // Variance 1, and no more than 3.5.
  double normal() { return (uniform() + uniform() + uniform() + uniform() - 2) * std::sqrt(3.0); }
  uint8_t byte() { return uint8_t(engine_() >> 8); }
  template <class T>
  T pick(std::initializer_list<T> of) {
    return of.begin()[between(0, int(of.size()) - 1)];
  }
  int32_t dtype() { return kFloatDtypes[between(0, 2)]; }

 private:
  std::mt19937 engine_;
};

}  // namespace river::checks
