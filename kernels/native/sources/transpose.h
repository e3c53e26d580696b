// Transposes 16 rows of 16 values of 32 bits, which may be pairs of 16 bits.
#pragma once

#include "vectors.h"

namespace river {

// to[16 j + i] = from[i * stride + j].
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
