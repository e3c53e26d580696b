// What logits choose: the largest, and the entropy of their distribution, by chunks; bits do not depend on threads.
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors/vector_math.h"

namespace river {

inline float sum_of_vector(Floats x) {
  float lanes[kLanes], sum = 0;
  store(lanes, x);
  for (const float lane : lanes) sum += lane;
  return sum;
}

// A chunk's largest logit m, and the sums of e^(z - m) and of (z - m) e^(z - m).
struct Weighed {
  float largest, total, spread;
};

// NaN is above all.
inline bool is_above(float a, float b) { return a > b || (a != a && b == b); }

// Loads a chunk of a row's logits and returns how many there are.
inline int load_chunk(const ChoiceArgs& a, int64_t row, int64_t chunk, float* z) {
  const int64_t first = chunk * kLogitsTogether;
  const int count = int(std::min<int64_t>(kLogitsTogether, a.logits_each - first));
  load_values(a.logits, row * a.stride + first, count, a.dtype, z);
  std::fill(z + count, z + kLogitsTogether, -INFINITY);
  return count;
}

// The largest logit of a chunk, or NaN. (With a choice of NaN in it, compilers make no vectors of the loop.)
inline float largest_of_chunk(const float* z) {
  Floats most = every(-INFINITY);
  auto bad = most != most;
  for (int k = 0; k < kLogitsTogether; k += kLanes) {
    const Floats x = load_floats(z + k);
    most = x > most ? x : most;
    bad |= x != x;
  }
  float lanes[kLanes];
  store(lanes, most);
  float largest = *std::max_element(lanes, lanes + kLanes);
  for (int j = 0; j < kLanes; ++j) largest = bad[j] ? NAN : largest;
  return largest;
}

inline Weighed weigh_chunk(const float* z, bool only_largest) {
  const float largest = largest_of_chunk(z);
  if (only_largest) return {largest, 0, 0};
  Floats total = zeros(), spread = zeros();
  // Unwanted logits add nothing to any sum, so a part of the chunk is enough.
  const int weighed = largest == kMaskedLogit ? kLanes : kLogitsTogether;
  for (int k = 0; k < weighed; k += kLanes) {
    const Floats shifted = load_floats(z + k) - largest, weight = exp_of(shifted);
    total = total + weight;
    spread = spread + weight * (shifted < -1e4f ? every(-1e4f) : shifted);  // (0 times -inf would be NaN)
  }
  return {largest, sum_of_vector(total), sum_of_vector(spread)};
}

inline void weigh(const void* args, int part, int parts) {
  const auto& a = *static_cast<const ChoiceArgs*>(args);
  alignas(64) float z[kLogitsTogether];
  for (auto [i, end] = share_of(int64_t(a.rows) * a.chunks, part, parts); i < end; ++i) {
    load_chunk(a, i / a.chunks, i % a.chunks, z);
    static_cast<Weighed*>(a.weighed)[i] = weigh_chunk(z, a.only_largest);
  }
}

inline float entropy_of(const ChoiceArgs& a, const Weighed* chunks, float largest) {
  float total = 0, spread = 0;
  for (int c = 0; c < a.chunks; ++c) {
    if (chunks[c].largest == -INFINITY) continue;
    const float lower = chunks[c].largest - largest, factor = std::exp(lower);
    total += chunks[c].total * factor;
    spread += (chunks[c].spread + chunks[c].total * std::max(lower, -1e4f)) * factor;
  }
  return std::log(total) - spread / total;
}

inline void choose(const void* args, int, int) {
  const auto& a = *static_cast<const ChoiceArgs*>(args);
  float most = -INFINITY;
  for (int64_t row = 0; row < a.rows; ++row) {
    const auto* chunks = static_cast<const Weighed*>(a.weighed) + row * a.chunks;
    int best = 0;
    for (int c = 1; c < a.chunks; ++c)
      if (is_above(chunks[c].largest, chunks[best].largest)) best = c;
    const float largest = chunks[best].largest, found = a.only_largest ? 0.0f : entropy_of(a, chunks, largest);
    most = is_above(found, most) ? found : most;
    if (!a.choices) continue;
    alignas(64) float z[kLogitsTogether];
    const int count = load_chunk(a, row, best, z);
    const float* first = std::find_if(z, z + count, [&](float l) { return !is_above(largest, l); });
    a.choices[2 * row] = double(best) * kLogitsTogether + (first - z);
    a.choices[2 * row + 1] = found;
  }
  if (a.score) *a.score = most;
}

}  // namespace river
