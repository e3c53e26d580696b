// The vectors of one instruction set (RIVER_ISA_*). `kHalves` vectors make up 64 bytes; registers hold the sums of
// kMostRows rows by four output features, or of kLines lines by kPanels panels of 16 lanes.
#pragma once

#if defined(RIVER_ISA_AVX512) || defined(RIVER_ISA_AVX512_VNNI) || defined(RIVER_ISA_AVX512_BF16) || \
    defined(RIVER_ISA_AMX)
#define RIVER_AVX512
#elif defined(RIVER_ISA_AVX2) || defined(RIVER_ISA_AVX_VNNI)
#define RIVER_AVX2
#elif defined(RIVER_ISA_NEON) || defined(RIVER_ISA_NEON_DOTPROD) || defined(RIVER_ISA_NEON_I8MM)
#define RIVER_NEON
#if !defined(RIVER_ISA_NEON)
#define RIVER_NEON_DOTS
#endif
#endif
#if defined(RIVER_AVX512) || defined(RIVER_AVX2)
#include "vectors/vectors_x86.h"
#else
#include "vectors/vectors_16_bytes.h"
#endif

namespace river {

#if defined(RIVER_AVX512) || defined(RIVER_AVX2)
// The sums of the lanes of four vectors.
RIVER_INLINE void sums_of_four(const Floats* v, float* sums) {
  __m128 a = quarters_of(v[0]), b = quarters_of(v[1]), c = quarters_of(v[2]), d = quarters_of(v[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(sums, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
}
#elif defined(RIVER_NEON)
RIVER_INLINE void sums_of_four(const Floats* v, float* sums) {
  const auto pairs = [&](int i) RIVER_INLINED { return vpaddq_f32((float32x4_t)v[i], (float32x4_t)v[i + 1]); };
  vst1q_f32(sums, vpaddq_f32(pairs(0), pairs(2)));
}
#else
RIVER_INLINE void sums_of_four(const Floats* v, float* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
}
#endif

constexpr int kLanes = 16 / kHalves;
#if defined(RIVER_AVX512) || defined(RIVER_AVX2) || defined(RIVER_NEON)
constexpr bool kHasVectors = true;
#else
constexpr bool kHasVectors = false;
#endif

RIVER_INLINE Floats zeros() { return Floats{}; }

typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
RIVER_INLINE Bits float_to_bits(Floats x) { return (Bits)x; }
RIVER_INLINE Floats bits_to_float(Bits x) { return (Floats)x; }

#if !defined(RIVER_NEON_DOTS)
// Sums of products of unsigned and signed bytes, by fours.
struct Dots {
  Ints sum;
#if defined(RIVER_ISA_AVX2)
  // Sums of 16 bits hold eight products of 15 and 127, by twos: the caller widens after every four lines.
  Ints narrow;
  RIVER_INLINE void begin(int32_t start) { sum = every(start), narrow = every(0); }
  RIVER_INLINE void add(Ints w, const int8_t* x) { narrow = add_dots(narrow, w, x); }
  RIVER_INLINE void widen() {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
    narrow = every(0);
  }
#elif defined(RIVER_ISA_NEON)
  // The same, of two output features and of the other two.
  int16x8_t narrow[2];
  RIVER_INLINE void begin(int32_t start) { sum = every(start), narrow[0] = narrow[1] = vdupq_n_s16(0); }
  RIVER_INLINE void add(Ints w, const int8_t* x) {
    const int8x16_t weights = (int8x16_t)w, factors = vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(x)));
    narrow[0] = vmlal_s8(narrow[0], vget_low_s8(weights), vget_low_s8(factors));
    narrow[1] = vmlal_high_s8(narrow[1], weights, factors);
  }
  RIVER_INLINE void widen() {
    sum += (Ints)vpaddq_s32(vpaddlq_s16(narrow[0]), vpaddlq_s16(narrow[1]));
    narrow[0] = narrow[1] = vdupq_n_s16(0);
  }
#else
  RIVER_INLINE void begin(int32_t start) { sum = every(start); }
  RIVER_INLINE void add(Ints w, const int8_t* x) { sum = add_dots(sum, w, x); }
  RIVER_INLINE void widen() {}
#endif
};
#endif

// Of pairs of bfloat16: their dot products; the sums of the lanes of four vectors, each in the same order; and `count`
// of the values that a vector holds, then zeros.
#if defined(RIVER_ISA_AVX512_BF16) || defined(RIVER_ISA_AMX)
constexpr bool kHasPairs = true;
RIVER_INLINE void sums_of_pairs(const Floats (&v)[4], float* sums) {
  const auto two_of = [](__m512 p, __m512 q)
                          RIVER_INLINED { return _mm512_add_ps(_mm512_unpacklo_ps(p, q), _mm512_unpackhi_ps(p, q)); };
  const __m512d first = _mm512_castps_pd(two_of(v[0], v[1])), second = _mm512_castps_pd(two_of(v[2], v[3]));
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                                        _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
RIVER_INLINE Ints load_some(const uint8_t* p, int64_t count) {
  return _mm512_maskz_loadu_epi16(__mmask32((1u << count) - 1), p);
}
RIVER_INLINE Floats dot_pairs(Floats sum, Ints a, Ints b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
// Rounds two vectors to pairs of bfloat16, one value of each.
RIVER_INLINE void store_pairs(Floats even, Floats odd, uint32_t* to) {
  const __m512i order = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  alignas(64) static constexpr uint16_t kPlaces[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kPlaces), order));
}
#elif defined(RIVER_ISA_NEON_I8MM)
constexpr bool kHasPairs = true;
RIVER_INLINE void sums_of_pairs(const Floats (&v)[4], float* sums) { sums_of_four(v, sums); }
RIVER_INLINE Ints load_some(const uint8_t* p, int64_t count) {
  Ints values = every(0);
  std::memcpy(&values, p, count * 2);
  return values;
}
RIVER_INLINE Floats dot_pairs(Floats sum, Ints a, Ints b) {
  return (Floats)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
RIVER_INLINE void store_pairs(Floats even, Floats odd, uint32_t* to) {
  const auto rounded = [](Floats x)
                           RIVER_INLINED { return vreinterpretq_u16_bf16(vcvtq_low_bf16_f32((float32x4_t)x)); };
  vst1q_u16(reinterpret_cast<uint16_t*>(to), vzip1q_u16(rounded(even), rounded(odd)));
}
#else
constexpr bool kHasPairs = false;
void sums_of_pairs(const Floats (&v)[4], float* sums);
Ints load_some(const uint8_t* p, int64_t count);
Floats dot_pairs(Floats sum, Ints a, Ints b);
void store_pairs(Floats even, Floats odd, uint32_t* to);
#endif

// Transposes 16 rows of 16 values of 32 bits, which may be pairs: to[16 j + i] = from[i * stride + j].
inline void transpose(const void* from, int64_t stride, void* to) {
  const auto* rows = static_cast<const float*>(from);
  auto* columns = static_cast<float*>(to);
#if defined(RIVER_AVX512)
  // Within the quarters of vectors first, then the quarters.
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(rows + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  const auto two_of = [](__m512 p, __m512 q, auto unpack)
                          RIVER_INLINED { return _mm512_castpd_ps(unpack(_mm512_castps_pd(p), _mm512_castps_pd(q))); };
  const auto low = [](__m512d p, __m512d q) RIVER_INLINED { return _mm512_unpacklo_pd(p, q); };
  const auto high = [](__m512d p, __m512d q) RIVER_INLINED { return _mm512_unpackhi_pd(p, q); };
  for (int i = 0; i < 16; i += 4) {
    a[i] = two_of(b[i], b[i + 2], low);
    a[i + 1] = two_of(b[i], b[i + 2], high);
    a[i + 2] = two_of(b[i + 1], b[i + 3], low);
    a[i + 3] = two_of(b[i + 1], b[i + 3], high);
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // quarters 0 and 2, or 1 and 3, of both
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_shuffle_f32x4(a[j], a[4 + j], kEven), odd = _mm512_shuffle_f32x4(a[j], a[4 + j], kOdd);
    const __m512 more_even = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], kEven);
    const __m512 more_odd = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], kOdd);
    _mm512_storeu_ps(columns + 16 * j, _mm512_shuffle_f32x4(even, more_even, kEven));
    _mm512_storeu_ps(columns + 16 * (4 + j), _mm512_shuffle_f32x4(odd, more_odd, kEven));
    _mm512_storeu_ps(columns + 16 * (8 + j), _mm512_shuffle_f32x4(even, more_even, kOdd));
    _mm512_storeu_ps(columns + 16 * (12 + j), _mm512_shuffle_f32x4(odd, more_odd, kOdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) std::memcpy(columns + 16 * j + i, rows + i * stride + j, 4);
#endif
}

}  // namespace river
