// Vectors of AVX-512 (64 bytes) and AVX2 (32 bytes).
#pragma once

#include <immintrin.h>

#include "vectors/vectors_common.h"

namespace river {

#if defined(RIVER_AVX512)

constexpr int kHalves = 1, kMostRows = 6, kLines = 8, kPanels = 3;
using Floats = __m512;
using Ints = __m512i;

RIVER_INLINE Floats every(float x) { return _mm512_set1_ps(x); }
RIVER_INLINE Ints every(int32_t x) { return _mm512_set1_epi32(x); }
RIVER_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
RIVER_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
RIVER_INLINE Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
RIVER_INLINE Ints load(const uint8_t* p) { return _mm512_loadu_si512(p); }
RIVER_INLINE void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
RIVER_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
RIVER_INLINE __m128 quarters_of(Floats x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
RIVER_INLINE Floats load_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
RIVER_INLINE Floats load_int8(const uint8_t* p) {
  return to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
RIVER_INLINE Floats load_float8(const uint8_t* p) {
  const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(int16_t(0xbf80))));
}
RIVER_INLINE Floats low_bfloat16(Ints x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
RIVER_INLINE Floats high_bfloat16(Ints x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int32_t(0xffff0000))));
}
RIVER_INLINE Ints low_nibbles(Ints x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
RIVER_INLINE Ints high_nibbles(Ints x) { return low_nibbles(_mm512_srli_epi32(x, 4)); }
RIVER_INLINE void store(uint16_t* p, Ints x) { _mm512_storeu_si512(p, x); }
RIVER_INLINE Ints repeated(const uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
RIVER_INLINE Ints look_up(Ints table, Ints x) { return _mm512_shuffle_epi8(table, x); }
RIVER_INLINE Ints interleave_low(Ints x, Ints y) { return _mm512_unpacklo_epi8(x, y); }
RIVER_INLINE Ints interleave_high(Ints x, Ints y) { return _mm512_unpackhi_epi8(x, y); }

RIVER_INLINE Ints widened(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

RIVER_INLINE Ints add_dots(Ints sum, Ints w, const int8_t* x) {
  const Ints factors = every(four_bytes(x));
#if defined(RIVER_ISA_AVX512)
  const Ints pairs = _mm512_maddubs_epi16(w, factors);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#else
  return _mm512_dpbusd_epi32(sum, w, factors);
#endif
}

#elif defined(RIVER_AVX2)

constexpr int kHalves = 2, kMostRows = 3, kLines = 4, kPanels = 1;
using Floats = __m256;
using Ints = __m256i;

RIVER_INLINE Floats every(float x) { return _mm256_set1_ps(x); }
RIVER_INLINE Ints every(int32_t x) { return _mm256_set1_epi32(x); }
RIVER_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
RIVER_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
RIVER_INLINE Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
RIVER_INLINE Ints load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
RIVER_INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
RIVER_INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
RIVER_INLINE __m128 quarters_of(Floats x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); }
RIVER_INLINE Floats load_float16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
RIVER_INLINE Floats load_int8(const uint8_t* p) {
  return to_floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
RIVER_INLINE Floats load_float8(const uint8_t* p) {
  const __m128i x = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16(int16_t(0xbf80))));
}
RIVER_INLINE Floats low_bfloat16(Ints x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
RIVER_INLINE Floats high_bfloat16(Ints x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int32_t(0xffff0000))));
}
RIVER_INLINE Ints low_nibbles(Ints x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
RIVER_INLINE Ints high_nibbles(Ints x) { return low_nibbles(_mm256_srli_epi32(x, 4)); }
RIVER_INLINE void store(uint16_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
RIVER_INLINE Ints repeated(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
RIVER_INLINE Ints look_up(Ints table, Ints x) { return _mm256_shuffle_epi8(table, x); }
RIVER_INLINE Ints interleave_low(Ints x, Ints y) { return _mm256_unpacklo_epi8(x, y); }
RIVER_INLINE Ints interleave_high(Ints x, Ints y) { return _mm256_unpackhi_epi8(x, y); }

RIVER_INLINE Ints widened(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

RIVER_INLINE Ints add_dots(Ints sum, Ints w, const int8_t* x) {
#if defined(RIVER_ISA_AVX_VNNI)
  return _mm256_dpbusd_avx_epi32(sum, w, every(four_bytes(x)));
#else
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, every(four_bytes(x))));
#endif
}

#endif

}  // namespace river
