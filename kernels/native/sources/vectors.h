// The vectors of one instruction set (RIVER_ISA_*). `kHalves` vectors make up 64 bytes; registers hold the sums of
// kMostRows rows by four output features, or of kLines lines by kPanels panels of 16 lanes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dtypes.h"

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
#include <immintrin.h>
#elif defined(RIVER_NEON)
#include <arm_neon.h>
#endif

#define RIVER_INLINE inline __attribute__((always_inline))
#define RIVER_INLINED __attribute__((always_inline))  // of a lambda

namespace river {

// Calls f with the constants 0 to N - 1: arrays indexed by them stay in registers, unlike in an unrolled loop.
template <int N, class F>
RIVER_INLINE void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      RIVER_INLINED { (f(std::integral_constant<int, I>()), ...); }(std::make_integer_sequence<int, N>());
}

// Splits `count` into equal batches of at most `Most`; calls f(size, as a constant, first, batch number, batches).
template <int Most, class F>
RIVER_INLINE void in_batches(int count, const F& f) {
  const int batches = (count + Most - 1) / Most;
  for (int batch = 0; batch < batches; ++batch) {
    const int first = count * batch / batches, size = count * (batch + 1) / batches - first;
    unrolled<Most>([&](auto i) RIVER_INLINED {
      if (i + 1 == size) f(std::integral_constant<int, i + 1>(), first, batch, batches);
    });
  }
}

RIVER_INLINE int32_t four_bytes(const int8_t* x) {
  int32_t value;
  std::memcpy(&value, x, 4);
  return value;
}

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

RIVER_INLINE Ints add_dots(Ints sum, Ints w, const int8_t* x) {
#if defined(RIVER_ISA_AVX_VNNI)
  return _mm256_dpbusd_avx_epi32(sum, w, every(four_bytes(x)));
#else
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, every(four_bytes(x))));
#endif
}

#else

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

#if defined(RIVER_NEON)

constexpr int kMostRows = 4, kLines = 4, kPanels = 1;

RIVER_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
RIVER_INLINE Floats load_float16(const uint16_t* p) { return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
RIVER_INLINE int16x4_t four_int8(const uint8_t* p) {
  return vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(uint32_t(four_bytes(reinterpret_cast<const int8_t*>(p)))))));
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
#endif

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
#if defined(RIVER_ISA_AVX512_BF16)
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
  const auto rounded = [](Floats x) RIVER_INLINED { return vreinterpretq_u16_bf16(vcvtq_low_bf16_f32((float32x4_t)x)); };
  vst1q_u16(reinterpret_cast<uint16_t*>(to), vzip1q_u16(rounded(even), rounded(odd)));
}
#else
constexpr bool kHasPairs = false;
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
