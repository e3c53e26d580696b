// Vectors of 16 bytes: of ARM's NEON, and as plain C++ for every other processor.
#pragma once

#if defined(RIVER_NEON)
#include <arm_neon.h>
#endif

#include "vectors/vectors_common.h"

namespace river {

constexpr int kHalves = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

RIVER_INLINE Floats every(float x) { return Floats{x, x, x, x}; }
RIVER_INLINE Ints every(int32_t x) { return Ints{x, x, x, x}; }
RIVER_INLINE Ints add(Ints a, Ints b) { return a + b; }
RIVER_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
RIVER_INLINE Ints load(const uint8_t* p) {
  Ints value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
RIVER_INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
RIVER_INLINE Floats load_floats(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
RIVER_INLINE Floats low_bfloat16(Ints x) { return (Floats)((Words)x << 16); }
RIVER_INLINE Floats high_bfloat16(Ints x) { return (Floats)((Words)x & 0xffff0000u); }
RIVER_INLINE Ints low_nibbles(Ints x) { return x & 0x0f0f0f0f; }
RIVER_INLINE Ints high_nibbles(Ints x) { return (Ints)((Bytes)x >> 4); }
RIVER_INLINE void store(uint16_t* p, Ints x) { std::memcpy(p, &x, sizeof x); }
RIVER_INLINE Ints repeated(const uint8_t* p) { return load(p); }
RIVER_INLINE Ints widened(const uint8_t* p) { return Ints{p[0], p[1], p[2], p[3]}; }

#if defined(RIVER_NEON)

constexpr int kMostRows = 4, kLines = 4, kPanels = 1;

RIVER_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
RIVER_INLINE Floats load_float16(const uint16_t* p) { return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
RIVER_INLINE int16x4_t four_int8(const uint8_t* p) {
  return vget_low_s16(
      vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(uint32_t(four_bytes(reinterpret_cast<const int8_t*>(p)))))));
}
RIVER_INLINE Floats load_int8(const uint8_t* p) { return to_floats((Ints)vmovl_s16(four_int8(p))); }
RIVER_INLINE Floats load_float8(const uint8_t* p) {
  const uint16x4_t x = vand_u16(vreinterpret_u16_s16(vshl_n_s16(four_int8(p), 7)), vdup_n_u16(0xbf80));
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(x));
}
RIVER_INLINE Ints look_up(Ints table, Ints x) { return (Ints)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)x); }
RIVER_INLINE Ints interleave_low(Ints x, Ints y) { return (Ints)vzip1q_u8((uint8x16_t)x, (uint8x16_t)y); }
RIVER_INLINE Ints interleave_high(Ints x, Ints y) { return (Ints)vzip2q_u8((uint8x16_t)x, (uint8x16_t)y); }

#else  // portable

constexpr int kMostRows = 2, kLines = 2, kPanels = 1;

RIVER_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
RIVER_INLINE Floats load_float16(const uint16_t* p) {
  return Floats{from_float16(p[0]), from_float16(p[1]), from_float16(p[2]), from_float16(p[3])};
}
RIVER_INLINE Floats load_int8(const uint8_t* p) {
  return Floats{float(int8_t(p[0])), float(int8_t(p[1])), float(int8_t(p[2])), float(int8_t(p[3]))};
}
RIVER_INLINE Floats load_float8(const uint8_t* p) {
  uint16_t halves[4];
  for (int i = 0; i < 4; ++i) halves[i] = uint16_t(int8_t(p[i]) << 7 & 0xbf80);
  return load_float16(halves);
}
RIVER_INLINE Ints look_up(Ints table, Ints x) {
  Bytes found;
  for (int i = 0; i < 16; ++i) found[i] = ((Bytes)table)[((Bytes)x)[i]];
  return (Ints)found;
}
RIVER_INLINE Ints interleave(Ints x, Ints y, int first) {
  Bytes mixed;
  for (int i = 0; i < 16; ++i) mixed[i] = ((Bytes)(i % 2 ? y : x))[first + i / 2];
  return (Ints)mixed;
}
RIVER_INLINE Ints interleave_low(Ints x, Ints y) { return interleave(x, y, 0); }
RIVER_INLINE Ints interleave_high(Ints x, Ints y) { return interleave(x, y, 8); }

RIVER_INLINE Ints add_dots(Ints sum, Ints w, const int8_t* x) {
  for (int j = 0; j < 4; ++j) sum += ((w >> (8 * j)) & 15) * every(int32_t(x[j]));
  return sum;
}

#endif

}  // namespace river
