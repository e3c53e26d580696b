// Products of 4-bit weights and int8 activations by ARM's dot products (sdot) and, for two rows and more with I8MM, by
// products of two rows by two output features (smmla). Sums are exact, so both give the same bits.
#pragma once

#include "vectors/vectors.h"

namespace river {

constexpr int kLineFeatures = 8, kQuarter = 16;  // input features of a line; bytes of four output features in it

// A quarter of a line: the input features 0 to 3 and 4 to 7 of four output features.
struct Nibbles {
  int8x16_t first, second;

  RIVER_INLINE explicit Nibbles(const uint8_t* quarter) {
    const uint8x16_t both = vld1q_u8(quarter);
    first = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
    second = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
  }
};

// sums[r][h] of four output features each = start[r] plus the products with R rows, whose values are `x`.
template <int R>
RIVER_INLINE void sums_by_dots(const uint8_t* w, const int8_t* const* x, const int32_t* start, int lines,
                               int32x4_t (*sums)[4]) {
  unrolled<4 * R>([&](auto i) RIVER_INLINED { sums[i / 4][i % 4] = vdupq_n_s32(start[i / 4]); });
  for (int i = 0; i < lines; i += 2, w += 128) {
    int8x16_t values[R];
    unrolled<R>([&](auto r) RIVER_INLINED { values[r] = vld1q_s8(x[r] + i * kLineFeatures); });
    unrolled<2>([&](auto j) RIVER_INLINED {
      fetch(w + j * 64);
      unrolled<4>([&](auto h) RIVER_INLINED {
        const Nibbles of(w + j * 64 + h * kQuarter);
        unrolled<R>([&](auto r) RIVER_INLINED {
          sums[r][h] = vdotq_laneq_s32(sums[r][h], of.first, values[r], 2 * j);
          sums[r][h] = vdotq_laneq_s32(sums[r][h], of.second, values[r], 2 * j + 1);
        });
      });
    });
  }
}

#if defined(RIVER_ISA_NEON_I8MM)
// The same of an even number of rows.
template <int R>
RIVER_INLINE void sums_by_tiles(const uint8_t* w, const int8_t* const* x, const int32_t* start, int lines,
                                int32x4_t (*sums)[4]) {
  int32x4_t tiles[R / 2][8];  // of rows 2 p and 2 p + 1 and two output features: two sums of one row, two of the other
  unrolled<R / 2>([&](auto p) RIVER_INLINED {
    const int32x4_t both = vcombine_s32(vdup_n_s32(start[2 * p]), vdup_n_s32(start[2 * p + 1]));
    unrolled<8>([&](auto i) RIVER_INLINED { tiles[p][i] = both; });
  });
  for (int i = 0; i < lines; ++i, w += 64) {
    int8x16_t values[R / 2];
    unrolled<R / 2>([&](auto p) RIVER_INLINED {
      values[p] = vcombine_s8(vld1_s8(x[2 * p] + i * kLineFeatures), vld1_s8(x[2 * p + 1] + i * kLineFeatures));
    });
    fetch(w);
    unrolled<4>([&](auto h) RIVER_INLINED {
      const Nibbles of(w + h * kQuarter);
      const int32x4_t first = vreinterpretq_s32_s8(of.first), second = vreinterpretq_s32_s8(of.second);
      const int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(first, second));
      const int8x16_t high = vreinterpretq_s8_s32(vzip2q_s32(first, second));
      unrolled<R / 2>([&](auto p) RIVER_INLINED {
        tiles[p][2 * h] = vmmlaq_s32(tiles[p][2 * h], values[p], low);
        tiles[p][2 * h + 1] = vmmlaq_s32(tiles[p][2 * h + 1], values[p], high);
      });
    });
  }
  unrolled<R / 2>([&](auto p) RIVER_INLINED {
    unrolled<4>([&](auto h) RIVER_INLINED {
      const int64x2_t low = vreinterpretq_s64_s32(tiles[p][2 * h]), high = vreinterpretq_s64_s32(tiles[p][2 * h + 1]);
      sums[2 * p][h] = vreinterpretq_s32_s64(vtrn1q_s64(low, high));
      sums[2 * p + 1][h] = vreinterpretq_s32_s64(vtrn2q_s64(low, high));
    });
  });
}
#endif

template <int R>
RIVER_INLINE void sums_of_lines(const uint8_t* w, const int8_t* const* x, const int32_t* start, int lines,
                                int32x4_t (*sums)[4]) {
#if defined(RIVER_ISA_NEON_I8MM)
  if constexpr (R % 2 == 0) return sums_by_tiles<R>(w, x, start, lines, sums);
#endif
  sums_by_dots<R>(w, x, start, lines, sums);
}

}  // namespace river
