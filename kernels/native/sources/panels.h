// Products whose right operand is panels, 16 columns that are the lanes of vectors, and whose left operand is
// broadcast.
#pragma once

#include <cstdint>

#include "phases.h"
#include "vectors.h"

namespace river {

// A word is a float32, or two values of bfloat16. Lines of the left operand and panels that one product takes at once.
#if defined(RIVER_AVX512)
constexpr int kLines = 8, kPanels = 3;
#elif defined(RIVER_AVX2)
constexpr int kLines = 4, kPanels = 1;
#else
constexpr int kLines = 2, kPanels = 1;
#endif

template <bool kPairs>
RIVER_INLINE Floats multiply_add(Ints a, Ints b, Floats sum) {
#if defined(RIVER_ISA_AVX512_BF16)
  if constexpr (kPairs) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
  return fma((Floats)a, (Floats)b, sum);
}

// Calls put(i, p, lane, sums) with sum over k of left[i line + k step] right[p][k, lane ...] for all lines and P
// panels.
template <bool kPairs, int P, class Put>
RIVER_INLINE void multiply(const uint32_t* left, int64_t line, int64_t step, const uint32_t* right, int64_t panel,
                           int count, const Put& put) {
  constexpr int kVectors = P * kHalves;
  Floats sums[kLines][kVectors];
  unrolled<kLines * kVectors>([&](auto i) RIVER_INLINED { sums[i / kVectors][i % kVectors] = zeros(); });
  for (int k = 0; k < count; ++k) {
    Ints lanes[kVectors];
    unrolled<kVectors>([&](auto v) RIVER_INLINED {
      const uint32_t* from = right + v / kHalves * panel + k * kBlock + v % kHalves * kLanes;
      lanes[v] = load(reinterpret_cast<const uint8_t*>(from));
    });
    unrolled<kLines>([&](auto i) RIVER_INLINED {
      const Ints one = every(int32_t(left[i * line + k * step]));
      unrolled<kVectors>([&](auto v) RIVER_INLINED { sums[i][v] = multiply_add<kPairs>(one, lanes[v], sums[i][v]); });
    });
  }
  unrolled<kLines * kVectors>([&](auto i) RIVER_INLINED {
    constexpr int kVector = i % kVectors;
    put(i / kVectors, kVector / kHalves, kVector % kHalves * kLanes, sums[i / kVectors][kVector]);
  });
}

// Two vectors of weights as one of words: pairs, or each by itself.
RIVER_INLINE void store_pairs(Floats even, Floats odd, uint32_t* to) {
#if defined(RIVER_ISA_AVX512_BF16)
  const __m512i order = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  alignas(64) static constexpr uint16_t kPlaces[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kPlaces), order));
#endif
}

}  // namespace river
