// Fits of 4-bit grids, GPTQ's rounding of blocks (reference: `kernels/quant/calibrated.py`), and packing in 12 bits.
// One thread runs each call. Vectors are of 16 floats, in several registers if need be.
#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors/dtypes.h"

namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Mask __attribute__((vector_size(64)));

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // vectors of output features that are rounded together
#else
constexpr int kVectors = 1;
#endif
constexpr int kRows = kVectors * kLanes;
constexpr int kLeast = -8, kMost = 7;
constexpr int kShrinks = 12, kRefits = 2;

inline Lanes every(float x) { return x - Lanes{}; }
inline Lanes load(const float* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Lanes x) { std::memcpy(p, &x, sizeof x); }
inline float sum_of(Lanes x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// The nearest point of a grid, q - 8. Numbers this small are rounded, half to even, by adding and taking away 1.5 2^23.
inline Lanes nearest(Lanes weight, Lanes scale, Lanes zero) {
  const Lanes least = every(kLeast), most = every(kMost), large = every(12582912.0f);
  Lanes q = (weight - zero) / scale;
  q = q < least ? least : q;
  q = q > most ? most : q;
  return (q + large) - large;
}

struct Grid {
  float scale, zero;
};

// One group of weights, with the importance of each one's squared error.
struct Group {
  const float* weights;
  const float* importance;
  int64_t size;
  bool bfloat16;
  float low, high;

  Group(const float* weights, const float* importance, int64_t size, bool bfloat16)
      : weights(weights), importance(importance), size(size), bfloat16(bfloat16), low(weights[0]), high(weights[0]) {
    for (int64_t i = 1; i < size; ++i) low = std::min(low, weights[i]), high = std::max(high, weights[i]);
  }

  Grid storable(float scale, float zero) const {
    if (bfloat16) scale = river::from_bfloat16(river::to_bfloat16(scale));
    const bool constant = scale < FLT_MIN;
    zero = constant ? low : zero;
    return {constant ? 1.0f : scale, bfloat16 ? river::from_bfloat16(river::to_bfloat16(zero)) : zero};
  }

  float noise(Grid grid) const {
    const Lanes scale = every(grid.scale), zero = every(grid.zero);
    Lanes sum = {};
    for (int64_t i = 0; i < size; i += kLanes) {
      const Lanes w = load(weights + i), off = nearest(w, scale, zero) * scale + zero - w;
      sum += off * off * load(importance + i);
    }
    return sum_of(sum);
  }

  // The scale and zero that suit the integers of a grid best, by weighted least squares.
  Grid refitted(Grid grid) const {
    const Lanes scale = every(grid.scale), zero = every(grid.zero);
    Lanes of_q = {}, of_w = {};
    for (int64_t i = 0; i < size; i += kLanes) {
      const Lanes w = load(weights + i), counts = load(importance + i);
      of_q += nearest(w, scale, zero) * counts;
      of_w += w * counts;
    }
    const float mean_q = sum_of(of_q), mean_w = sum_of(of_w);
    Lanes of_squares = {}, of_products = {};
    for (int64_t i = 0; i < size; i += kLanes) {
      const Lanes w = load(weights + i), spread = nearest(w, scale, zero) - mean_q;
      const Lanes weighted = spread * load(importance + i);
      of_squares += weighted * spread;
      of_products += weighted * w;
    }
    const float variance = sum_of(of_squares), slope = sum_of(of_products) / variance;
    const float found = variance > 0 && slope > 0 ? slope : grid.scale;
    return {found, mean_w - found * mean_q};
  }

  Grid fitted() const {
    const float step = (high - low) / 15;
    Grid best = storable(step, low + 8 * step);
    float least = noise(best);
    for (int i = 0; i < kShrinks + kRefits; ++i) {
      const float scale = (high - low) * (1 - 0.04f * float(i + 1)) / 15;
      Grid next = i < kShrinks ? Grid{scale, (low + high + scale) / 2} : refitted(best);
      next = storable(next.scale, next.zero);
      const float of_next = noise(next);
      if (of_next < least) best = next, least = of_next;
    }
    return best;
  }
};

// Rounds column `k` of some output features and moves those after it; leaves q - 8 in its place.
void round_column(int64_t k, int64_t columns, const float* scales, const float* zeros, const float* factors,
                  float* lefts, float* errors) {
  for (int v = 0; v < kRows; v += kLanes) {
    const Lanes scale = load(scales + v), zero = load(zeros + v);
    const Lanes w = load(lefts + k * kRows + v), q = nearest(w, scale, zero);
    const Lanes error = (w - (q * scale + zero)) / factors[k];
    store(lefts + k * kRows + v, q);
    store(errors + v, error);
    for (int64_t j = k + 1; j < columns; ++j) {
      float* const other = lefts + j * kRows + v;
      store(other, load(other) - error * factors[j]);
    }
  }
}

}  // namespace

#define RIVER_EXPORTED extern "C" __attribute__((visibility("default")))

// weight [rows, groups * size], size a multiple of 16; importance sums to one in each group; scale, zero [rows,
// groups].
RIVER_EXPORTED void river_fit_grid(const float* weight, const float* importance, int64_t rows, int64_t groups,
                                   int64_t size, bool bfloat16, float* scale, float* zero) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t at = row * groups + group;
      const Grid grid = Group(weight + at * size, importance + group * size, size, bfloat16).fitted();
      scale[at] = grid.scale;
      zero[at] = grid.zero;
    }
  }
}

// left, errors, q [columns, rows]; scale, zero [groups, rows]; group_of [columns]; factor upper triangular [columns,
// columns], rows `factor_stride` apart. Missing output features at the end have a grid of ones.
RIVER_EXPORTED void river_round_block(const float* left, const float* scale, const float* zero, const int64_t* group_of,
                                      const float* factor, int64_t factor_stride, int64_t columns, int64_t rows,
                                      float* errors, uint8_t* q) {
  std::vector<float> lefts(columns * kRows), scales(kRows), zeros(kRows), wrong(kRows);
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = std::min<int64_t>(kRows, rows - first);
    std::fill(scales.begin(), scales.end(), 1.0f);
    std::fill(zeros.begin(), zeros.end(), 0.0f);
    std::fill(lefts.begin(), lefts.end(), 0.0f);
    for (int64_t k = 0; k < columns; ++k) std::copy_n(left + k * rows + first, count, &lefts[k * kRows]);
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t grid = group_of[k] * rows + first, at = k * rows + first;
      std::copy_n(scale + grid, count, scales.data());
      std::copy_n(zero + grid, count, zeros.data());
      round_column(k, columns, scales.data(), zeros.data(), factor + k * factor_stride, lefts.data(), wrong.data());
      std::copy_n(wrong.data(), count, errors + at);
      for (int64_t row = 0; row < count; ++row) q[at + row] = uint8_t(int(lefts[k * kRows + row]) - kLeast);
    }
  }
}

// counts: [256], how many weights have each upper byte; those of earlier calls are added to.
RIVER_EXPORTED void river_count_upper(const uint16_t* weights, int64_t count, int64_t* counts) {
  int64_t several[4][256] = {};  // (neighbours mostly have the same one, and an addition waits for the one before it)
  for (int64_t i = 0; i < count; ++i) ++several[i % 4][weights[i] >> 8];
  for (const auto& of : several)
    for (int byte = 0; byte < 256; ++byte) counts[byte] += of[byte];
}

// Packs weights [rows, features] as in bf12.h: units [fours, units, 6, 64], first [fours + 1], and the patches.
RIVER_EXPORTED void river_pack_bf12(const uint16_t* weights, int64_t rows, int64_t features, const uint8_t* palette,
                                    uint8_t* units, int64_t fours, int32_t* first, int32_t* patches) {
  using river::kFour, river::kUnit, river::kUnitBytes;
  int code_of[256];
  std::fill(code_of, code_of + 256, -1);
  for (int code = 15; code >= 0; --code) code_of[palette[code]] = code;
  const int64_t across = (features + kUnit - 1) / kUnit;
  std::memset(units, 0, fours * across * kUnitBytes);
  int32_t* next = patches;
  for (int64_t four = 0; four < fours; ++four) {
    first[four] = int32_t((next - patches) / 2);
    for (int64_t k = 0; k < features; ++k) {
      const int64_t i = k % kUnit, place = i % 32 / 8 * 16 + i / 32 * 8 + i % 8;
      uint8_t* const unit = units + (four * across + k / kUnit) * kUnitBytes + place;
      for (int n = 0; n < std::min<int64_t>(kFour, rows - kFour * four); ++n) {
        const uint16_t weight = weights[(kFour * four + n) * features + k];
        const int code = code_of[weight >> 8];
        if (code < 0) {
          *next++ = int32_t(kFour * k + n);
          *next++ = weight;
          continue;
        }
        unit[(2 + n) * kUnit] = uint8_t(weight);
        unit[n / 2 * kUnit] |= uint8_t(code << n % 2 * 4);
      }
    }
  }
  first[fours] = int32_t((next - patches) / 2);
}
