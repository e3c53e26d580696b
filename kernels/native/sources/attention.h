// Attention of a few query positions over a static cache, each by itself and chunk by chunk, chunks combined by
// log-sum-exp (online softmax: Milakov and Gimelshein 2018; split over the keys: Flash-Decoding, Dao et al. 2023).
//
// Keys and values of slots that take no part are never read, and the query heads that share a key-value head read it
// once. Chunks are counted from a row's first slot that takes part. So every result is summed in one order, whatever the
// number of positions and threads, and however much padding stands before the row. Not handled: masks that differ
// between heads, and many positions, which prompt_attention.h is for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "functions.h"
#include "phases.h"
#include "scalars.h"

namespace river {

constexpr int kHeads = 8;  // query heads that are computed together
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Slots of one chunk that take part, and what the mask adds to their scores.
struct Live {
  int32_t slots[kChunk];
  float added[kChunk];
  int count = 0;
};

// Whether slot number `slot` of the mask's row at `at` takes part, and what is added to its score.
inline bool takes_part(const AttentionArgs& a, int64_t at, int slot, float& added) {
  added = 0;
  if (!a.mask) return true;
  if (a.mask_dtype == kBool) return static_cast<const uint8_t*>(a.mask)[at + slot];
  const float least = a.mask_dtype == kFloat16 ? -65504.0f : -3.3895e38f;
  added = load_scalar(a.mask, at + slot, a.mask_dtype);
  return !(added <= least / 2);
}

// The first of a row's slots that takes part, `slots` where none does. Every chunk asks, and padding or a window may
// put it far behind.
inline int first_live(const AttentionArgs& a, int64_t at, int slots) {
  if (a.mask && a.mask_dtype == kBool) {
    const void* mask = static_cast<const uint8_t*>(a.mask) + at;
    const void* found = std::memchr(mask, 1, slots);
    return found ? int(static_cast<const uint8_t*>(found) - static_cast<const uint8_t*>(mask)) : slots;
  }
  float added;
  int first = 0;
  while (first < slots && !takes_part(a, at, first, added)) ++first;
  return first;
}

// Finds those of chunk number `chunk` of a row.
inline void find_live(const AttentionArgs& a, int64_t row, int chunk, Live& live) {
  const int64_t at = row / a.positions * a.mask_sequence + row % a.positions * a.mask_position;
  const int slots = a.causal ? int(std::min<int64_t>(a.slots, row % a.positions + 1)) : a.slots;
  const int first = first_live(a, at, slots) + chunk * kChunk;
  float added;
  for (int slot = first; slot < std::min(first + kChunk, slots); ++slot) {
    if (!takes_part(a, at, slot, added)) continue;
    live.slots[live.count] = slot;
    live.added[live.count++] = added;
  }
}

// Reads one vector of a head as float32, filled up with zeros to a multiple of 16.
inline void load_head(const void* p, int64_t at, const AttentionArgs& a, float* x) {
  load_values(p, at, a.head_dim, a.dtype, x);
  std::fill(x + a.head_dim, x + (a.head_dim + 15) / 16 * 16, 0.0f);
}

struct Scores {
  alignas(64) float of[kHeads][kChunk];
  float largest[kHeads], total[kHeads];
};

inline void score(const AttentionArgs& a, const Live& live, int64_t cache_at, const float (*q)[kMostHeadFeatures],
                  int heads, Scores& scores) {
  alignas(64) float key[kMostHeadFeatures];
  const int size = (a.head_dim + 15) / 16 * 16;
  for (int i = 0; i < live.count; ++i) {
    load_head(a.cache.keys, cache_at + live.slots[i] * a.cache.slot, a, key);
    for (int h = 0; h < heads; ++h) scores.of[h][i] = dot_of(q[h], key, size) * a.scale;
  }
  for (int h = 0; h < heads; ++h) {
    float* s = scores.of[h];
    if (a.softcap > 0)
      for (int i = 0; i < live.count; ++i) s[i] = a.softcap * tanh_of(s[i] / a.softcap);
    float largest = kMinusInfinity, total = 0;
    for (int i = 0; i < live.count; ++i) s[i] += live.added[i];
    for (int i = 0; i < live.count; ++i) largest = s[i] > largest || s[i] != s[i] ? s[i] : largest;
    for (int i = 0; i < live.count; ++i) s[i] = exp_of(s[i] - largest);
    for (int i = 0; i < live.count; ++i) total += s[i];
    scores.largest[h] = largest;
    scores.total[h] = total;
  }
}

inline void add_values(const AttentionArgs& a, const Live& live, int64_t cache_at, const Scores& scores, int heads,
                       float (*sums)[kMostHeadFeatures]) {
  alignas(64) float value[kMostHeadFeatures];
  const int size = (a.head_dim + 15) / 16 * 16;
  for (int h = 0; h < heads; ++h) std::fill(sums[h], sums[h] + size, 0.0f);
  for (int i = 0; i < live.count; ++i) {
    load_head(a.cache.values, cache_at + live.slots[i] * a.cache.slot, a, value);
    for (int h = 0; h < heads; ++h) {
      const float weight = scores.of[h][i];
      for (int d = 0; d < size; ++d) sums[h][d] += weight * value[d];
    }
  }
}

inline void attend_chunk(const AttentionArgs& a, int64_t row, int64_t kv_head, int chunk) {
  const int shared = a.heads / a.kv_heads;
  const int64_t cache_at = row / a.positions * a.cache.sequence + kv_head * a.cache.head;
  alignas(64) float q[kHeads][kMostHeadFeatures], sums[kHeads][kMostHeadFeatures];
  Live live;
  Scores scores;
  find_live(a, row, chunk, live);
  for (int done = 0; done < shared; done += kHeads) {
    const int heads = std::min(kHeads, shared - done);
    const int64_t first = row * a.heads + kv_head * shared + done;
    for (int h = 0; h < heads; ++h) load_head(a.q, (first + h) * a.head_dim, a, q[h]);
    score(a, live, cache_at, q, heads, scores);
    add_values(a, live, cache_at, scores, heads, sums);
    for (int h = 0; h < heads; ++h) {
      if (a.chunks == 1) {
        const float factor = live.count ? 1.0f / scores.total[h] : 0.0f;
        for (int d = 0; d < a.head_dim; ++d) sums[h][d] *= factor;
        store_values(a.out, (first + h) * a.head_dim, a.head_dim, a.dtype, sums[h]);
      } else {
        float* partial = a.partial + ((first + h) * a.chunks + chunk) * (a.head_dim + 2);
        std::copy(sums[h], sums[h] + a.head_dim, partial);
        partial[a.head_dim] = scores.largest[h];
        partial[a.head_dim + 1] = scores.total[h];
      }
    }
  }
}

inline void attend(const void* args, int part, int parts) {
  const auto& a = *static_cast<const AttentionArgs*>(args);
  const int64_t all = int64_t(a.batch) * a.positions * a.kv_heads * a.chunks;
  for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i)
    attend_chunk(a, i / a.chunks / a.kv_heads, i / a.chunks % a.kv_heads, int(i % a.chunks));
}

inline void combine(const void* args, int part, int parts) {
  const auto& a = *static_cast<const AttentionArgs*>(args);
  const int64_t all = int64_t(a.batch) * a.positions * a.heads, each = a.head_dim + 2;
  alignas(64) float sum[kMostHeadFeatures];
  for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i) {
    const float* partial = a.partial + i * a.chunks * each;
    float largest = kMinusInfinity, total = 0;
    for (int c = 0; c < a.chunks; ++c) {
      const float one = partial[c * each + a.head_dim];
      largest = one > largest || one != one ? one : largest;
    }
    std::fill(sum, sum + a.head_dim, 0.0f);
    for (int c = 0; c < a.chunks; ++c) {
      const float* of = partial + c * each;
      if (of[a.head_dim + 1] == 0) continue;  // no slot of this chunk takes part
      const float factor = exp_of(of[a.head_dim] - largest);
      total += of[a.head_dim + 1] * factor;
      for (int d = 0; d < a.head_dim; ++d) sum[d] += of[d] * factor;
    }
    const float factor = total == 0 ? 0.0f : 1.0f / total;
    for (int d = 0; d < a.head_dim; ++d) sum[d] *= factor;
    store_values(a.out, i * a.head_dim, a.head_dim, a.dtype, sum);
  }
}

}  // namespace river
