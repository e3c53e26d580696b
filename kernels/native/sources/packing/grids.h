// Fits of 4-bit grids (reference: `kernels/quant/fit.py`): a lane is an output feature, so that no sum crosses lanes.
// Vectors are of 16 floats, in several registers if need be.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>

#include "vectors/dtypes.h"

namespace river {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Mask __attribute__((vector_size(64)));

constexpr int kLanes = 16;
constexpr int kLeast = -8, kMost = 7;
constexpr int kShrinks = 12, kRefits = 2;

inline Lanes every(float x) { return x - Lanes{}; }
inline Lanes load(const float* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Lanes x) { std::memcpy(p, &x, sizeof x); }

// Numbers within a grid's integers, half to even, by adding and taking away 1.5 2^23.
inline Lanes rounded(Lanes q) {
  const Lanes least = every(kLeast), most = every(kMost), large = every(12582912.0f);
  q = q < least ? least : q;
  q = q > most ? most : q;
  return (q + large) - large;
}

// The nearest point of a grid, q - 8.
inline Lanes nearest(Lanes weight, Lanes scale, Lanes zero) { return rounded((weight - zero) / scale); }

struct Grids {
  Lanes scale, zero;
};

// The same group of 16 output features, with the importance of each weight's squared error.
struct Groups {
  const float* weights;     // [size, 16]
  const float* importance;  // [size], sums to one
  int64_t size;
  bool bfloat16;
  Lanes low, high;

  Groups(const float* weights, const float* importance, int64_t size, bool bfloat16)
      : weights(weights), importance(importance), size(size), bfloat16(bfloat16), low(at(0)), high(at(0)) {
    for (int64_t i = 1; i < size; ++i) {
      const Lanes w = at(i);
      low = w < low ? w : low;
      high = w > high ? w : high;
    }
  }

  Lanes at(int64_t i) const { return load(weights + i * kLanes); }

  Lanes stored(Lanes x) const {
    if (!bfloat16) return x;
    Mask bits;
    std::memcpy(&bits, &x, sizeof x);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & int32_t(0xffff0000);
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  Grids storable(Lanes scale, Lanes zero) const {
    scale = stored(scale);
    const Mask constant = scale < FLT_MIN;
    return {constant ? every(1) : scale, stored(constant ? low : zero)};
  }

  // Candidates are compared by products with the reciprocal, a fraction of a division's time.
  Lanes noise(const Grids& grids) const {
    const Lanes inverse = 1 / grids.scale, scale = grids.scale, zero = grids.zero;
    Lanes sums[2] = {};  // an addition waits for the one before it
    for (int64_t i = 0; i < size; ++i) {
      const Lanes from_zero = at(i) - zero, off = rounded(from_zero * inverse) * scale - from_zero;
      sums[i % 2] += off * off * importance[i];
    }
    return sums[0] + sums[1];
  }

  // The scales and zeros that suit the integers of grids best, by weighted least squares.
  Grids refitted(const Grids& grids) const {
    Lanes mean_q = {}, mean_w = {};
    for (int64_t i = 0; i < size; ++i) {
      mean_q += nearest(at(i), grids.scale, grids.zero) * importance[i];
      mean_w += at(i) * importance[i];
    }
    Lanes variance = {}, product = {};
    for (int64_t i = 0; i < size; ++i) {
      const Lanes spread = nearest(at(i), grids.scale, grids.zero) - mean_q, weighted = spread * importance[i];
      variance += weighted * spread;
      product += weighted * at(i);
    }
    const Lanes slope = product / variance;
    const Lanes scale = (variance > 0) & (slope > 0) ? slope : grids.scale;
    return {scale, mean_w - scale * mean_q};
  }

  Grids fitted() const {
    const Lanes step = (high - low) / 15;
    Grids best = storable(step, low + 8 * step);
    Lanes least = noise(best);
    for (int i = 0; i < kShrinks + kRefits; ++i) {
      const Lanes scale = (high - low) * ((1 - 0.04f * float(i + 1)) / 15);
      Grids next = i < kShrinks ? Grids{scale, (low + high + scale) / 2} : refitted(best);
      next = storable(next.scale, next.zero);
      const Lanes of_next = noise(next);
      const Mask better = of_next < least;
      best = {better ? next.scale : best.scale, better ? next.zero : best.zero};
      least = better ? of_next : least;
    }
    return best;
  }
};

// Reads a group of up to 16 rows, `features` apart, as [size, 16]; missing rows are zeros.
template <int kDtype>
void read_groups(const void* weight, int64_t first, int64_t features, int rows, int64_t size, float* groups) {
  float row[kLargestGroup];
  if (rows < kLanes) std::fill(groups, groups + size * kLanes, 0.0f);
  for (int n = 0; n < rows; ++n) {
    load_values(weight, first + n * features, int(size), kDtype, row);
    for (int64_t i = 0; i < size; ++i) groups[i * kLanes + n] = row[i];
  }
}

}  // namespace river
