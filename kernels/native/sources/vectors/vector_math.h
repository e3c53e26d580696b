// Functions of float32 that loops over many values call: exponential, activations, sums in one fixed order.
#pragma once

#include <cmath>

#include "vectors/vectors.h"

namespace river {

// e^x within 2 ulp for -87 < x < 88, clamped beyond, NaN for NaN; for a float or each lane.
template <class T>
inline T exp_of(T x) {
  x = x < -87.0f ? T{} - 87.0f : x;
  x = x > 88.0f ? T{} + 88.0f : x;
  const T shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  const T n = shifted - 12582912.0f;
  const T r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in n * part
  T p = T{} + 1.0f / 5040;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  return p * bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);  // (2^n: n stands in the lowest bits)
}

template <class T>
inline T tanh_of(T x) {
  const T e = exp_of(-2.0f * (x < 0.0f ? -x : x));
  const T t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

inline void activate(int32_t activation, float* y, int count) {
  if (activation == kSilu)
    for (int i = 0; i < count; ++i) y[i] = y[i] / (1.0f + exp_of(-y[i]));
  else if (activation == kGelu)
    for (int i = 0; i < count; ++i) y[i] = 0.5f * y[i] * (1.0f + std::erf(y[i] * 0.70710678f));
  else if (activation == kGeluTanh)
    for (int i = 0; i < count; ++i)
      y[i] = 0.5f * y[i] * (1.0f + tanh_of(0.79788456f * (y[i] + 0.044715f * y[i] * y[i] * y[i])));
  else if (activation == kRelu)
    for (int i = 0; i < count; ++i) y[i] = y[i] < 0 ? 0.0f : y[i];
  else if (activation == kClampedSwish)
    for (int i = 0; i < count; ++i) {
      const float least = y[i] > kSwishLimit ? kSwishLimit : y[i];
      y[i] = least / (1.0f + exp_of(-kSwishSlope * least));
    }
}

// Sums of 16 lanes, halved until one is left.
inline float sum_of_lanes(float* lanes) {
  for (int half = 8; half; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

// `size` is a multiple of 16.
inline float sum_of(const float* values, int size) {
  float lanes[16] = {};
  for (int i = 0; i < size; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += values[i + j];
  return sum_of_lanes(lanes);
}

inline float dot_of(const float* a, const float* b, int size) {
  float lanes[16] = {};
  for (int i = 0; i < size; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += a[i + j] * b[i + j];
  return sum_of_lanes(lanes);
}

}  // namespace river
