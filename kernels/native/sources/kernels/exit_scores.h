// The exit score of hidden states: a cosine.
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors/vector_math.h"

namespace river {

// (The least of the cosines, NaN where there is one.)
inline void exit_score(const void* args, int, int) {
  const auto& a = *static_cast<const ScoreArgs*>(args);
  constexpr int kFeatures = 256;
  alignas(64) float x[kFeatures], y[kFeatures];
  float least = INFINITY;
  for (int row = 0; row < a.rows; ++row) {
    float xy = 0, xx = 0, yy = 0;
    for (int first = 0; first < a.features; first += kFeatures) {
      const int count = std::min(kFeatures, a.features - first), padded = (count + 15) / 16 * 16;
      load_filled(a.hidden.data, row * a.hidden.stride + first, count, padded, a.dtype, x);
      load_filled(a.previous.data, row * a.previous.stride + first, count, padded, a.dtype, y);
      xy += dot_of(x, y, padded);
      xx += dot_of(x, x, padded);
      yy += dot_of(y, y, padded);
    }
    const float cosine = xy / (std::sqrt(xx) * std::sqrt(yy));
    least = cosine < least || cosine != cosine ? cosine : least;
  }
  *a.score = least;
}

}  // namespace river
