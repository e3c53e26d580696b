// The vectors of one instruction set, chosen by RIVER_ISA_*: float32 and int32 lanes, and the product of a line of
// packed weights with prepared activations. A line is 64 bytes, 16 output features by 8 input features; `kHalves`
// vectors make up a line, and a vector holds 16 / kHalves output features. Registers hold the sums of kMostRows rows by
// four output features.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "scalars.h"

#if defined(RIVER_ISA_AVX512) || defined(RIVER_ISA_AVX512_VNNI) || defined(RIVER_ISA_AVX512_BF16) || \
    defined(RIVER_ISA_AMX)
#define RIVER_AVX512
#elif defined(RIVER_ISA_AVX2) || defined(RIVER_ISA_AVX_VNNI)
#define RIVER_AVX2
#endif
#if defined(RIVER_AVX512) || defined(RIVER_AVX2)
#include <immintrin.h>
#endif

#define RIVER_INLINE inline __attribute__((always_inline))
#define RIVER_INLINED __attribute__((always_inline))  // of a lambda

namespace river {

// Calls f with the constants 0 to N - 1: arrays that are indexed with them stay in registers, which a loop that is
// unrolled later does not bring about.
template <int N, class F>
RIVER_INLINE void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      RIVER_INLINED { (f(std::integral_constant<int, I>()), ...); }(std::make_integer_sequence<int, N>());
}

// Splits `count` things into as few shares of at most `Most` as there can be, of nearly one size. Calls
// f(how many, the first one, number of the share, shares); how many is a constant.
template <int Most, class F>
RIVER_INLINE void in_shares(int count, const F& f) {
  const int shares = (count + Most - 1) / Most;
  for (int share = 0; share < shares; ++share) {
    const int first = count * share / shares, size = count * (share + 1) / shares - first;
    unrolled<Most>([&](auto i) RIVER_INLINED {
      if (i + 1 == size) f(std::integral_constant<int, i + 1>(), first, share, shares);
    });
  }
}

RIVER_INLINE int32_t four_bytes(const int8_t* x) {
  int32_t value;
  std::memcpy(&value, x, 4);
  return value;
}

#if defined(RIVER_AVX512)

constexpr int kHalves = 1, kMostRows = 6;
using Floats = __m512;
using Ints = __m512i;

RIVER_INLINE Floats zeros() { return _mm512_setzero_ps(); }
RIVER_INLINE Floats every(float x) { return _mm512_set1_ps(x); }
RIVER_INLINE Ints every(int32_t x) { return _mm512_set1_epi32(x); }
RIVER_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
RIVER_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
RIVER_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
RIVER_INLINE Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
RIVER_INLINE Ints load(const uint8_t* p) { return _mm512_loadu_si512(p); }
RIVER_INLINE void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
RIVER_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
RIVER_INLINE __m128 quarters_of(Floats x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
RIVER_INLINE Floats load_bfloat16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
RIVER_INLINE Floats load_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
RIVER_INLINE Floats low_bfloat16(Ints x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
RIVER_INLINE Floats high_bfloat16(Ints x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int32_t(0xffff0000))));
}
RIVER_INLINE Ints low_nibbles(Ints x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
RIVER_INLINE Ints high_nibbles(Ints x) { return low_nibbles(_mm512_srli_epi32(x, 4)); }

// Sums of products of unsigned and signed bytes, by fours.
struct Dots {
  Ints sum;
  RIVER_INLINE void begin(int32_t start) { sum = every(start); }
  RIVER_INLINE void add(Ints w, const int8_t* x) {
    const Ints factors = every(four_bytes(x));
#if defined(RIVER_ISA_AVX512)
    const Ints pairs = _mm512_maddubs_epi16(w, factors);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#else
    sum = _mm512_dpbusd_epi32(sum, w, factors);
#endif
  }
  RIVER_INLINE void widen() {}
};

#elif defined(RIVER_AVX2)

constexpr int kHalves = 2, kMostRows = 3;
using Floats = __m256;
using Ints = __m256i;

RIVER_INLINE Floats zeros() { return _mm256_setzero_ps(); }
RIVER_INLINE Floats every(float x) { return _mm256_set1_ps(x); }
RIVER_INLINE Ints every(int32_t x) { return _mm256_set1_epi32(x); }
RIVER_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
RIVER_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
RIVER_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
RIVER_INLINE Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
RIVER_INLINE Ints load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
RIVER_INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
RIVER_INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
RIVER_INLINE __m128 quarters_of(Floats x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); }
RIVER_INLINE Floats load_bfloat16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
RIVER_INLINE Floats load_float16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
RIVER_INLINE Floats low_bfloat16(Ints x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
RIVER_INLINE Floats high_bfloat16(Ints x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int32_t(0xffff0000))));
}
RIVER_INLINE Ints low_nibbles(Ints x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
RIVER_INLINE Ints high_nibbles(Ints x) { return low_nibbles(_mm256_srli_epi32(x, 4)); }

struct Dots {
  Ints sum;
#if defined(RIVER_ISA_AVX_VNNI)
  RIVER_INLINE void begin(int32_t start) { sum = every(start); }
  RIVER_INLINE void add(Ints w, const int8_t* x) { sum = _mm256_dpbusd_avx_epi32(sum, w, every(four_bytes(x))); }
  RIVER_INLINE void widen() {}
#else
  // Sums of 16 bits hold eight products of 15 and 127, by twos: the caller widens after every four lines.
  Ints narrow;
  RIVER_INLINE void begin(int32_t start) {
    sum = every(start);
    narrow = _mm256_setzero_si256();
  }
  RIVER_INLINE void add(Ints w, const int8_t* x) {
    narrow = _mm256_add_epi16(narrow, _mm256_maddubs_epi16(w, every(four_bytes(x))));
  }
  RIVER_INLINE void widen() {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
    narrow = _mm256_setzero_si256();
  }
#endif
};

#else

constexpr int kHalves = 4, kMostRows = 2;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

RIVER_INLINE Floats every(float x) { return Floats{x, x, x, x}; }
RIVER_INLINE Ints every(int32_t x) { return Ints{x, x, x, x}; }
RIVER_INLINE Floats zeros() { return every(0.0f); }
RIVER_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
RIVER_INLINE Floats mul(Floats a, Floats b) { return a * b; }
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
RIVER_INLINE float sum_of(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }
RIVER_INLINE Floats load_bfloat16(const uint16_t* p) {
  return (Floats)(Words{uint32_t(p[0]) << 16, uint32_t(p[1]) << 16, uint32_t(p[2]) << 16, uint32_t(p[3]) << 16});
}
RIVER_INLINE Floats load_float16(const uint16_t* p) {
  return Floats{from_float16(p[0]), from_float16(p[1]), from_float16(p[2]), from_float16(p[3])};
}
RIVER_INLINE Floats low_bfloat16(Ints x) { return (Floats)((Words)x << 16); }
RIVER_INLINE Floats high_bfloat16(Ints x) { return (Floats)((Words)x & 0xffff0000u); }
RIVER_INLINE Ints low_nibbles(Ints x) { return x & 0x0f0f0f0f; }
RIVER_INLINE Ints high_nibbles(Ints x) { return (Ints)((Words)x >> 4) & 0x0f0f0f0f; }

struct Dots {
  Ints sum;
  RIVER_INLINE void begin(int32_t start) { sum = every(start); }
  RIVER_INLINE void add(Ints w, const int8_t* x) {
    for (int j = 0; j < 4; ++j) sum += ((w >> (8 * j)) & 15) * every(int32_t(x[j]));
  }
  RIVER_INLINE void widen() {}
};

#endif

#if defined(RIVER_AVX512) || defined(RIVER_AVX2)
RIVER_INLINE float sum_of(Floats x) {
  const __m128 four = quarters_of(x), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// The sums of the lanes of four vectors, each with the bits of `sum_of`.
RIVER_INLINE void sums_of_four(const Floats* v, float* sums) {
  __m128 a = quarters_of(v[0]), b = quarters_of(v[1]), c = quarters_of(v[2]), d = quarters_of(v[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(sums, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
}
#else
RIVER_INLINE void sums_of_four(const Floats* v, float* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = sum_of(v[i]);
}
#endif

constexpr int kLanes = 16 / kHalves;
constexpr bool kHasVectors = kHalves < 4;

typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
RIVER_INLINE Bits float_to_bits(Floats x) { return (Bits)x; }
RIVER_INLINE Floats bits_to_float(Bits x) { return (Floats)x; }

}  // namespace river
