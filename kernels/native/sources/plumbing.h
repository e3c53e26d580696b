// What stands between products and attention: counters, copies, and the score that decides an exit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "functions.h"
#include "phases.h"
#include "scalars.h"

namespace river {

inline void count(const void* args, int part, int) {
  const auto& a = *static_cast<const CountArgs*>(args);
  for (int64_t i = 0; part == 0 && i < a.count; ++i)
    a.out[i] = a.a[a.one_a ? 0 : i] + (a.b ? a.b[a.one_b ? 0 : i] : 0) + a.by;
}

inline void copy(const void* args, int part, int parts) {
  const auto& a = *static_cast<const CopyArgs*>(args);
  const int64_t first = a.bytes * part / parts, end = a.bytes * (part + 1) / parts;
  std::memcpy(static_cast<char*>(a.to) + first, static_cast<const char*>(a.from) + first, end - first);
}

// (Slots are adjacent.)
inline void shift(const void* args, int part, int parts) {
  const auto& a = *static_cast<const ShiftArgs*>(args);
  const int64_t all = int64_t(a.batch) * a.heads;
  for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i) {
    char* entries = a.cache + i / a.heads * a.sequence + i % a.heads * a.head;
    std::memmove(entries, entries + a.slot, (a.slots - 1) * a.slot);
  }
}

// (The least of the cosines, NaN where there is one.)
inline void score(const void* args, int part, int) {
  const auto& a = *static_cast<const ScoreArgs*>(args);
  constexpr int kFeatures = 256;
  alignas(64) float x[kFeatures], y[kFeatures];
  float least = INFINITY;
  for (int row = 0; part == 0 && row < a.rows; ++row) {
    float xy = 0, xx = 0, yy = 0;
    for (int first = 0; first < a.features; first += kFeatures) {
      const int count = std::min(kFeatures, a.features - first), padded = (count + 15) / 16 * 16;
      load_values(a.hidden, row * a.hidden_stride + first, count, a.dtype, x);
      load_values(a.previous, row * a.previous_stride + first, count, a.dtype, y);
      std::fill(x + count, x + padded, 0.0f);
      std::fill(y + count, y + padded, 0.0f);
      xy += dot_of(x, y, padded);
      xx += dot_of(x, x, padded);
      yy += dot_of(y, y, padded);
    }
    const float cosine = xy / (std::sqrt(xx) * std::sqrt(yy));
    least = cosine < least || cosine != cosine ? cosine : least;
  }
  if (part == 0) *a.score = least;
}

}  // namespace river
