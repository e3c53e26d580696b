// Fits of 4-bit grids, GPTQ's rounding of blocks (reference: `kernels/quant/calibrated.py`), packing in 4 and 12 bits,
// and finding MXFP4 (`kernels/quant/mxfp4.py`). One thread runs each call.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "packing/grids.h"

namespace {

using namespace river;

#if defined(__AVX512F__)
constexpr int kVectors = 4;  // vectors of output features that are rounded together
#else
constexpr int kVectors = 1;
#endif
constexpr int kRows = kVectors * kLanes;

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

// The 64 bytes of 8 features of 16 output features: a lane's byte j has feature j below, 4 + j above.
void store_line(const float* groups, const Grids& grids, const Mask& there, uint8_t* line) {
  Mask bytes = {};
  for (int j = 0; j < 8; ++j) {
    const Lanes q = nearest(load(groups + j * kLanes), grids.scale, grids.zero) - float(kLeast);
    bytes |= __builtin_convertvector(q, Mask) << (8 * (j % 4) + 4 * (j / 4));
  }
  bytes &= there;
  std::memcpy(line, &bytes, sizeof bytes);
}

// What packing has read and lost, in float64.
struct Energy {
  double signal = 0, noise = 0;

  void add(const Groups& groups, const Grids& grids, int rows) {
    Lanes signal_of = {}, noise_of = {};
    for (int64_t i = 0; i < groups.size; ++i) {
      const Lanes w = groups.at(i), off = nearest(w, grids.scale, grids.zero) * grids.scale + grids.zero - w;
      signal_of += w * w;
      noise_of += off * off;
    }
    for (int n = 0; n < rows; ++n) signal += signal_of[n], noise += noise_of[n];
  }
};

template <int kDtype>
bool pack_rows(const void* weight, int64_t rows, int64_t groups, int64_t size, uint8_t* lines, uint16_t* scale_zero,
               Energy& energy) {
  alignas(64) float values[kLargestGroup * kLanes], importance[kLargestGroup];
  std::fill(importance, importance + size, 1 / float(size));
  Mask infinite = {};
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int count = int(std::min<int64_t>(kLanes, rows - first));
    Mask there = {};
    for (int n = 0; n < count; ++n) there[n] = -1;
    for (int64_t group = 0; group < groups; ++group) {
      read_groups<kDtype>(weight, (first * groups + group) * size, groups * size, count, size, values);
      const Groups of(values, importance, size, true);
      for (int64_t i = 0; i < size; ++i) infinite |= of.at(i) - of.at(i) != 0;
      const Grids grids = of.fitted();
      energy.add(of, grids, count);
      const int64_t block = first / kLanes * groups + group;
      for (int64_t i = 0; i < size; i += 8)
        store_line(values + i * kLanes, grids, there, lines + (block * size + i) * 8);
      for (int n = 0; n < kLanes; ++n) {
        scale_zero[(block * kLanes + n) * 2] = n < count ? to_bfloat16(grids.scale[n]) : 0;
        scale_zero[(block * kLanes + n) * 2 + 1] = n < count ? to_bfloat16(grids.zero[n]) : 0;
      }
    }
  }
  for (int n = 0; n < kLanes; ++n)
    if (infinite[n]) return false;
  return true;
}

}  // namespace

#define RIVER_EXPORTED extern "C" __attribute__((visibility("default")))

// weight [rows, groups * size], size up to 128; importance sums to one in each group; scale, zero [rows, groups].
RIVER_EXPORTED void river_fit_grid(const float* weight, const float* importance, int64_t rows, int64_t groups,
                                   int64_t size, bool bfloat16, float* scale, float* zero) {
  alignas(64) float values[kLargestGroup * kLanes];
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int count = int(std::min<int64_t>(kLanes, rows - first));
    for (int64_t group = 0; group < groups; ++group) {
      read_groups<kFloat32>(weight, (first * groups + group) * size, groups * size, count, size, values);
      const Grids grids = Groups(values, importance + group * size, size, bfloat16).fitted();
      for (int n = 0; n < count; ++n) {
        scale[(first + n) * groups + group] = grids.scale[n];
        zero[(first + n) * groups + group] = grids.zero[n];
      }
    }
  }
}

// Packs a weight [rows, groups * size] of any dtype in the layout "native", rounded to the grids of the least squared
// error. size is a multiple of 8, up to 128. energies: the sums of the squares of the weights and of their errors.
// Returns whether all weights are finite.
RIVER_EXPORTED bool river_pack_mse(const void* weight, int32_t dtype, int64_t rows, int64_t groups, int64_t size,
                                   uint8_t* lines, uint16_t* scale_zero, double* energies) {
  Energy energy;
  bool finite = false;
  with_dtype(dtype, [&](auto known) {
    finite = pack_rows<decltype(known)::value>(weight, rows, groups, size, lines, scale_zero, energy);
  });
  energies[0] = energy.signal;
  energies[1] = energy.noise;
  return finite;
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
  int64_t several[4][256] = {};  // (neighbors mostly have the same one, and an addition waits for the one before it)
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

// Finds blocks [groups, 16] and scales [groups] of MXFP4 with exactly the values of `groups` groups of 32 bfloat16
// weights, and returns whether there are any. The code of a magnitude follows from its distance from the scale's power
// of two: -128 for 0.5, and 64 times the code minus 2 for numbers from 1 on.
RIVER_EXPORTED bool river_find_mxfp4(const uint16_t* weights, int64_t groups, uint8_t* blocks, uint8_t* scales) {
  constexpr int kNotANumber = 255, kLeastNormal = 128;
  for (int64_t group = 0; group < groups; ++group) {
    const uint16_t* const bits = weights + group * river::kMxGroup;
    int largest = 0, others = 0;
    for (int i = 0; i < river::kMxGroup; ++i) largest = std::max(largest, bits[i] & 0x7fff);
    const int scale = std::max((largest >> 7) - 2, 0);
    uint8_t codes[river::kMxGroup];
    for (int i = 0; i < river::kMxGroup; ++i) {
      const int magnitude = bits[i] & 0x7fff, step = magnitude - (scale << 7);
      const bool is_zero = magnitude == 0, is_half = step == -128;
      const bool is_number = is_half | ((step >= 0) & (step <= 320) & ((step & 63) == 0));
      others += !(is_zero | (is_number & (magnitude >= kLeastNormal)));
      codes[i] = uint8_t((is_zero ? 0 : is_half ? 1 : (step >> 6) + 2) | (bits[i] >> 12 & 8));
    }
    if (others || scale + 2 >= kNotANumber) return false;
    for (int i = 0; i < river::kMxGroup / 2; ++i)
      blocks[group * river::kMxGroup / 2 + i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
    scales[group] = uint8_t(scale);
  }
  return true;
}
