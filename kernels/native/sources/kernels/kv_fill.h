// Positions of q|k|v on their way to attention: heads normalised and rotated, keys and values into the cache's slots.
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors/dtypes.h"

namespace river {

inline void normalise_head(const KvFillArgs& a, const void* weight, float* x) {
  float squares = 0, w[kMostHeadFeatures];
  for (int i = 0; i < a.head_dim; ++i) squares += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(squares / float(a.head_dim) + a.eps);
  const float plus = a.norm == kRmsPlusOne ? 1.0f : 0.0f;
  load_values(weight, 0, a.head_dim, a.dtype, w);
  for (int i = 0; i < a.head_dim; ++i) x[i] = x[i] * factor * (w[i] + plus);
}

inline void rotate_head(const KvFillArgs& a, int64_t row, float* x) {
  float cos[kMostHeadFeatures], sin[kMostHeadFeatures];
  const int64_t at = row / a.positions * a.rotary_sequence + row % a.positions * a.rotary_position;
  const int half = a.rotary_dim / 2, columns = a.half_tables ? half : a.rotary_dim;
  load_values(a.cos, at, columns, a.rotary_dtype, cos);
  load_values(a.sin, at, columns, a.rotary_dtype, sin);
  for (int i = 0; i < half; ++i) {
    const int first = a.interleaved ? 2 * i : i, second = a.interleaved ? 2 * i + 1 : i + half;
    const int of_first = a.half_tables ? i : first, of_second = a.half_tables ? i : second;
    const float turned = x[first] * cos[of_first] - x[second] * sin[of_first];
    x[second] = x[second] * cos[of_second] + x[first] * sin[of_second];
    x[first] = turned;
  }
}

inline int64_t slot_of(const KvFillArgs& a, int64_t position) {
  if (a.slot_bytes == 8) return static_cast<const int64_t*>(a.slot)[position];
  return static_cast<const int32_t*>(a.slot)[position];
}

inline void kv_fill(const void* args, int part, int parts) {
  const auto& a = *static_cast<const KvFillArgs*>(args);
  const int64_t each = a.heads + 2 * a.kv_heads, bytes = bytes_of(a.dtype);
  alignas(64) float x[kMostHeadFeatures];
  for (auto [i, end] = share_of(each * a.batch * a.positions, part, parts); i < end; ++i) {
    const int64_t row = i / each, head = i % each, kv_head = (head - a.heads) % a.kv_heads;
    const bool is_query = head < a.heads, is_key = !is_query && head < a.heads + a.kv_heads;
    const int64_t slot = slot_of(a, row % a.positions);
    if (!is_query && (slot < 0 || slot >= a.slots)) continue;
    load_values(a.qkv.data, row * a.qkv.stride + head * a.head_dim, a.head_dim, a.dtype, x);
    if ((is_query || is_key) && a.norm) normalise_head(a, is_query ? a.q_norm : a.k_norm, x);
    if ((is_query || is_key) && a.cos) rotate_head(a, row, x);
    if (is_query) {
      store_values(a.q, (row * a.heads + head) * a.head_dim, a.head_dim, a.dtype, x);
    } else {
      const int64_t at = row / a.positions * a.cache.sequence + kv_head * a.cache.head + slot * a.cache.slot;
      store_values((is_key ? a.cache.keys : a.cache.values) + at * bytes, 0, a.head_dim, a.dtype, x);
    }
  }
}

}  // namespace river
