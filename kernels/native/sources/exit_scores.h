// Exit scores: cosines of hidden states, and entropies by chunks; their bits do not depend on threads.
#pragma once

#include <algorithm>
#include <cmath>

#include "vector_math.h"

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

// A chunk's largest logit m, and the sums of e^(z - m) and of (z - m) e^(z - m).
struct Weighed {
  float largest, total, spread;
};

inline void weigh(const void* args, int part, int parts) {
  const auto& a = *static_cast<const EntropyArgs*>(args);
  constexpr int kWidth = 16;
  alignas(64) float z[kLogitsTogether];
  for (auto [i, end] = share_of(int64_t(a.rows) * a.chunks, part, parts); i < end; ++i) {
    const int64_t first = i % a.chunks * kLogitsTogether;
    const int count = int(std::min<int64_t>(kLogitsTogether, a.logits_each - first));
    load_values(a.logits, i / a.chunks * a.stride + first, count, a.dtype, z);
    std::fill(z + count, z + kLogitsTogether, -INFINITY);
    float most[kWidth], totals[kWidth] = {}, spreads[kWidth] = {};
    std::fill(most, most + kWidth, -INFINITY);
    for (int k = 0; k < kLogitsTogether; k += kWidth)
      for (int j = 0; j < kWidth; ++j) most[j] = z[k + j] > most[j] || z[k + j] != z[k + j] ? z[k + j] : most[j];
    Weighed w{-INFINITY, 0, 0};
    for (const float m : most) w.largest = m > w.largest || m != m ? m : w.largest;
    const float largest = w.largest;
    // (Of what nobody wants any part is nothing.)
    const int weighed = largest == kUnwanted ? kWidth : kLogitsTogether;
    for (int k = 0; k < weighed; k += kWidth)
      for (int j = 0; j < kWidth; ++j) {
        const float shifted = z[k + j] - largest, weight = exp_of(shifted);
        totals[j] += weight;
        spreads[j] += weight * (shifted < -1e4f ? -1e4f : shifted);  // (0 times -inf would be NaN)
      }
    for (int j = 0; j < kWidth; ++j) {
      w.total += totals[j];
      w.spread += spreads[j];
    }
    static_cast<Weighed*>(a.weighed)[i] = w;
  }
}

inline void entropy(const void* args, int, int) {
  const auto& a = *static_cast<const EntropyArgs*>(args);
  float most = -INFINITY;
  for (int64_t row = 0; row < a.rows; ++row) {
    const auto* chunks = static_cast<const Weighed*>(a.weighed) + row * a.chunks;
    float largest = -INFINITY, total = 0, spread = 0;
    for (int c = 0; c < a.chunks; ++c) {
      const float one = chunks[c].largest;
      largest = one > largest || one != one ? one : largest;
    }
    for (int c = 0; c < a.chunks; ++c) {
      if (chunks[c].largest == -INFINITY) continue;
      const float lower = chunks[c].largest - largest, factor = std::exp(lower);
      total += chunks[c].total * factor;
      spread += (chunks[c].spread + chunks[c].total * std::max(lower, -1e4f)) * factor;
    }
    const float found = std::log(total) - spread / total;
    most = found > most || found != found ? found : most;
    if (found != found) break;
  }
  *a.score = most;
}

}  // namespace river
