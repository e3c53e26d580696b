// What lies around the matmuls of a mixture of experts: the choice, its order, and the weighted sum. Bits of a token do
// not depend on threads or on other tokens.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/choices.h"

namespace river {

inline void sort(const void* args, int, int) {
  const auto& a = *static_cast<const SortArgs*>(args);
  const auto bin_of = [&](int64_t chosen) { return chosen >= 0 && chosen < a.experts ? chosen : a.experts; };
  std::fill(a.starts, a.starts + a.experts + 2, 0);
  for (int row = 0; row < a.rows; ++row) ++a.starts[bin_of(a.chosen[row]) + 1];
  for (int bin = 0; bin <= a.experts; ++bin) a.starts[bin + 1] += a.starts[bin];
  for (int row = 0; row < a.rows; ++row) {
    const int64_t bin = bin_of(a.chosen[row]);
    const int32_t place = a.starts[bin]++;
    a.expert[place] = bin < a.experts ? bin : -1;
    a.order[place] = row;
    a.place[row] = place;
  }
}

inline void combine_experts(const void* args, int part, int parts) {
  const auto& a = *static_cast<const CombineArgs*>(args);
  constexpr int kSize = kLargestGroup;
  alignas(64) float sums[kSize], values[kSize];
  const int64_t groups = ceil_div(a.features, kSize);
  for (auto [i, end] = share_of(a.rows * groups, part, parts); i < end; ++i) {
    const int64_t row = i / groups, first = i % groups * kSize;
    const int count = int(std::min<int64_t>(kSize, a.features - first));
    std::fill(sums, sums + kSize, 0.0f);
    for (int j = 0; j < a.each; ++j) {
      const float weight = load_scalar(a.weight, row * a.each + j, a.weight_dtype);
      load_filled(a.values, int64_t(a.place[row * a.each + j]) * a.features + first, count, kSize, a.dtype, values);
      for (int k = 0; k < kSize; ++k) sums[k] += weight * values[k];
    }
    if (a.residual.data) {
      load_filled(a.residual.data, row * a.residual.stride + first, count, kSize, a.dtype, values);
      for (int k = 0; k < kSize; ++k) sums[k] += values[k];
    }
    store_values(a.y, row * a.features + first, count, a.dtype, sums);
  }
}

inline void route(const void* args, int part, int parts) {
  const auto& a = *static_cast<const RouteArgs*>(args);
  float z[kMostExperts], weight[kMostExperts];
  bool taken[kMostExperts];
  for (auto [row, end] = share_of(a.rows, part, parts); row < end; ++row) {
    load_values(a.logits.data, row * a.logits.stride, a.experts, a.dtype, z);
    std::fill(taken, taken + a.experts, false);
    for (int j = 0; j < a.each; ++j) {
      int best = -1;
      for (int e = 0; e < a.experts; ++e)
        if (!taken[e] && (best < 0 || is_above(z[e], z[best]))) best = e;
      taken[best] = true;
      a.index[row * a.each + j] = best;
    }
    const int64_t* const index = a.index + row * a.each;
    const float largest = z[index[0]];
    float all = 0, chosen = 0;
    for (int e = 0; a.routing != kAmongChosen && e < a.experts; ++e) all += std::exp(z[e] - largest);
    for (int j = 0; j < a.each; ++j) chosen += weight[j] = std::exp(z[index[j]] - largest);
    const float total = a.routing == kAmongAll ? all : chosen;
    for (int j = 0; j < a.each; ++j) weight[j] /= total;
    store_values(a.weight, row * a.each, a.each, a.weight_dtype, weight);
  }
}

}  // namespace river
