// Attention of a few query positions over a static cache, chunk by chunk, combined by log-sum-exp (online softmax:
// Milakov and Gimelshein 2018; split keys: Flash-Decoding, Dao et al. 2023). Masked slots are never read. Query heads
// of a key-value head and positions with the same slots share reads. Chunks count from a row's first unmasked slot, so
// bits do not depend on positions, threads or padding. Sinks join the sums of all chunks. Not handled: masks that
// differ between heads, and many positions.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/attention_mask.h"
#include "kernels/dots_of_pairs.h"
#include "kernels/gemm_f32.h"

namespace river {

// What one part needs for up to kQueries queries, heads of positions, that meet a chunk of slots.
struct Scratch {
  alignas(64) float q[kQueries][kMostHeadFeatures], sums[kQueries][kMostHeadFeatures];
  alignas(64) float scores[kQueries][kChunk + 16];
  float largest[kQueries], total[kQueries];
  Live live[kQueries];  // of each position
};

// What `count` queries from number `first` on read of the slots `from` to `to - 1` of a list.
struct SlotRange {
  const int32_t* slots;
  int from, to, first, count;
};

constexpr int kSlotsAhead = 16;  // whose keys are asked for

// Whether queries meet keys in dot products of pairs. (Weights of values would lose bits as bfloat16.)
template <int D>
constexpr bool kInPairs = kHasPairs && D == kBFloat16;

template <int D>
RIVER_INLINE void fetch_slot(const AttentionArgs& a, const char* entries, int32_t slot) {
  const char* const entry = entries + slot * a.cache.slot * bytes_of(D);
  for (int byte = 0; byte < a.head_dim * bytes_of(D); byte += 64) __builtin_prefetch(entry + byte);
}

// Asks for the values of the slots too, which are read next.
template <int D>
void score(const AttentionArgs& a, const char* keys, const char* values, const SlotRange& s, Scratch& m) {
  const int64_t slot_bytes = a.cache.slot * bytes_of(D);
  for (int i = s.from; i < s.to; i += 4) {
    const char* four[4];
    for (int j = 0; j < 4; ++j) {
      const int32_t slot = s.slots[std::min(i + j, s.to - 1)];
      four[j] = keys + slot * slot_bytes;
      fetch_slot<D>(a, values, slot);
      fetch_slot<D>(a, keys, s.slots[std::min(i + j + kSlotsAhead, s.to - 1)]);
    }
    const Matrix<float> scores{m.scores[s.first] + i, kChunk + 16};
    if constexpr (kInPairs<D>)
      in_batches<kMostRows>(s.count, [&](auto r, int first, int, int) RIVER_INLINED {
        const auto* q = reinterpret_cast<const char*>(m.q[s.first + first]);
        dots_of_pairs<r, 4>([&](auto t) RIVER_INLINED { return four[t]; }, a.head_dim, q, sizeof m.q[0],
                            {scores.data + first * scores.stride, scores.stride}, [](int64_t) {});
      });
    else
      dots<4, D>(four, a.head_dim, {m.q[s.first], kMostHeadFeatures}, s.count, scores, [](int64_t, int, int) {});
  }
}

// Scales and caps the scores of one query and turns them into weights, zeros up to a multiple of 16.
inline void weigh(const AttentionArgs& a, const Live& live, int query, Scratch& m) {
  float* const scores = m.scores[query];
  const int count = live.count, whole = (count + 15) / 16 * 16;
  const auto each = [&](const auto& f) RIVER_INLINED {
    for (int i = 0; i < whole; i += kLanes) store(scores + i, f(i, load_floats(scores + i)));
  };
  if (a.softcap > 0)
    each([&](int, Floats s) RIVER_INLINED { return tanh_of(s * a.scale / a.softcap) * a.softcap; });
  else
    each([&](int, Floats s) RIVER_INLINED { return s * a.scale; });
  std::fill(scores + count, scores + whole, kMinusInfinity);
  Floats most = every(kMinusInfinity);
  each([&](int i, Floats s) RIVER_INLINED {
    s = s + load_floats(live.added + i);
    most = s > most ? s : most;
    return s;
  });
  float lanes[kLanes];
  store(lanes, most);
  const float largest = *std::max_element(lanes, lanes + kLanes);
  each([&](int, Floats s) RIVER_INLINED { return exp_of(s - largest); });  // (NaN stays NaN)
  std::fill(scores + count, scores + whole, 0.0f);
  m.largest[query] = largest;
  m.total[query] = sum_of(scores, whole);
}

// Adds a piece of the values of some slots, times their weights, to the sums of R queries.
template <int R, int D>
RIVER_INLINE void add_piece(const AttentionArgs& a, const char* values, const SlotRange& s, int first, int d,
                            Scratch& m) {
  constexpr int kVectors = kPiece / kLanes;
  const int64_t slot_bytes = a.cache.slot * bytes_of(D);
  const int missing = std::max(d + kPiece - a.head_dim, 0);
  Floats sums[R][kVectors];
  const auto each = [&](const auto& f) RIVER_INLINED {
    unrolled<R>([&](auto r) RIVER_INLINED { unrolled<kVectors>([&](auto u) RIVER_INLINED { f(r, u); }); });
  };
  each([&](auto r, auto u) RIVER_INLINED { sums[r][u] = load_floats(m.sums[first + r] + d + u * kLanes); });
  char last[kPiece * bytes_of(D)] = {};
  for (int i = s.from; i < s.to; ++i) {
    const char* piece = values + s.slots[i] * slot_bytes + d * bytes_of(D);
    if (missing) piece = static_cast<const char*>(std::memcpy(last, piece, (kPiece - missing) * bytes_of(D)));
    unrolled<kVectors>([&](auto u) RIVER_INLINED {
      const Floats value = load_vector<D, u>(piece);
      unrolled<R>([&](auto r) RIVER_INLINED { sums[r][u] = fma(value, every(m.scores[first + r][i]), sums[r][u]); });
    });
  }
  each([&](auto r, auto u) RIVER_INLINED { store(m.sums[first + r] + d + u * kLanes, sums[r][u]); });
}

template <int D>
void add_values(const AttentionArgs& a, const char* values, const SlotRange& s, Scratch& m) {
  if (s.from >= s.to) return;
  for (int d = 0; d < a.head_dim; d += kPiece)
    in_batches<kMostRows>(s.count, [&](auto r, int first, int, int)
                                       RIVER_INLINED { add_piece<r, D>(a, values, s, s.first + first, d, m); });
}

template <int D>
void load_query(const AttentionArgs& a, int64_t at, float* q) {
  if constexpr (kInPairs<D>) {
    std::memset(q, 0, ceil_div(a.head_dim, kPiece) * kPiece * 2);
    std::memcpy(q, static_cast<const uint16_t*>(a.q) + at * a.head_dim, a.head_dim * 2);
    return;
  }
  alignas(64) float values[kMostHeadFeatures];
  const int size = (a.head_dim + kPiece - 1) / kPiece * kPiece;
  load_filled(a.q, at * a.head_dim, a.head_dim, size, D, values);
  if (D == kBFloat16)
    split(values, size, q);
  else
    std::copy(values, values + size, q);
}

// By what a query's sum of all slots becomes its result, given the largest score and the sum of the weights.
inline float factor_of(const AttentionArgs& a, int64_t head, float largest, float total) {
  if (total == 0) return 0;  // no slot takes part
  if (!a.sinks) return 1.0f / total;
  const float sink = load_scalar(a.sinks, head, a.sinks_dtype);
  const float most = sink > largest ? sink : largest, shrunk = exp_of(largest - most);
  return shrunk / (total * shrunk + exp_of(sink - most));
}

// Writes what was summed for query number `at` of all: the result where there is one chunk, else a part of it.
template <int D>
void store_sums(const AttentionArgs& a, int64_t at, int chunk, int query, const Scratch& m) {
  alignas(64) float sums[kMostHeadFeatures];
  if (D == kBFloat16)
    join(m.sums[query], (a.head_dim + kPiece - 1) / kPiece * kPiece, sums);
  else
    std::copy(m.sums[query], m.sums[query] + a.head_dim, sums);
  if (a.chunks == 1) {
    const float factor = factor_of(a, at % a.heads, m.largest[query], m.total[query]);
    for (int d = 0; d < a.head_dim; ++d) sums[d] *= factor;
    return store_values(a.out, at * a.head_dim, a.head_dim, D, sums);
  }
  float* partial = a.partial + (at * a.chunks + chunk) * (a.head_dim + 2);
  std::copy(sums, sums + a.head_dim, partial);
  partial[a.head_dim] = m.largest[query];
  partial[a.head_dim + 1] = m.total[query];
}

// Up to how many of the slots that they read several positions agree.
inline int common_slots(const Live* live, int positions) {
  int common = live[0].count;
  for (int p = 1; p < positions; ++p) {
    common = std::min(common, live[p].count);
    if (std::memcmp(live[0].slots, live[p].slots, common * sizeof(int32_t)) != 0)
      common = int(std::mismatch(live[0].slots, live[0].slots + common, live[p].slots).first - live[0].slots);
  }
  return common;
}

// The queries of `positions` positions from row `row` on, of one key-value head, and one chunk of slots.
template <int D>
void attend_chunk(const AttentionArgs& a, int64_t row, int positions, int64_t kv_head, int chunk) {
  const int shared = a.heads / a.kv_heads;
  const int64_t cache_at = (row / a.positions * a.cache.sequence + kv_head * a.cache.head) * bytes_of(D);
  const char *keys = a.cache.keys + cache_at, *values = a.cache.values + cache_at;
  Scratch m;
  for (int p = 0; p < positions; ++p) find_live(a, row + p, chunk, m.live[p]);
  const int common = common_slots(m.live, positions);
  for (int done = 0; done < shared; done += kQueries) {
    const int heads = std::min(kQueries, shared - done), queries = positions * heads;
    const auto number_of = [&](int q) { return (row + q / heads) * a.heads + kv_head * shared + done + q % heads; };
    const auto each_range = [&](const auto& f) {
      f({m.live[0].slots, 0, common, 0, queries});
      for (int p = 0; p < positions; ++p) f({m.live[p].slots, common, m.live[p].count, p * heads, heads});
    };
    for (int i = 0; done == 0 && i < std::min(kSlotsAhead, m.live[0].count); ++i)
      fetch_slot<D>(a, keys, m.live[0].slots[i]);
    for (int q = 0; q < queries; ++q) load_query<D>(a, number_of(q), m.q[q]);
    each_range([&](const SlotRange& s) { score<D>(a, keys, values, s, m); });
    for (int q = 0; q < queries; ++q) {
      weigh(a, m.live[q / heads], q, m);
      std::fill(m.sums[q], m.sums[q] + (a.head_dim + kPiece - 1) / kPiece * kPiece, 0.0f);
    }
    each_range([&](const SlotRange& s) { add_values<D>(a, values, s, m); });
    for (int q = 0; q < queries; ++q) store_sums<D>(a, number_of(q), chunk, q, m);
  }
}

// Parts split chunks, key-value heads and groups of `together` positions; those of a chunk read it from the cache.
template <int D>
void attend_all(const AttentionArgs& a, int part, int parts) {
  const int64_t groups = ceil_div(a.positions, a.together), inner = a.chunks * groups;
  for (auto [i, end] = share_of(a.batch * a.kv_heads * inner, part, parts); i < end; ++i) {
    const int64_t first = i % groups * a.together, sequence = i / inner / a.kv_heads;
    attend_chunk<D>(a, sequence * a.positions + first, int(std::min<int64_t>(a.together, a.positions - first)),
                    i / inner % a.kv_heads, int(i % inner / groups));
  }
}

inline void attend(const void* args, int part, int parts) {
  const auto& a = *static_cast<const AttentionArgs*>(args);
  with_dtype(a.dtype, [&](auto d) { attend_all<d>(a, part, parts); });
}

inline void combine(const void* args, int part, int parts) {
  const auto& a = *static_cast<const AttentionArgs*>(args);
  const int64_t each = a.head_dim + 2;
  alignas(64) float sum[kMostHeadFeatures];
  for (auto [i, end] = share_of(int64_t(a.batch) * a.positions * a.heads, part, parts); i < end; ++i) {
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
    const float factor = factor_of(a, i % a.heads, largest, total);
    for (int d = 0; d < a.head_dim; ++d) sum[d] *= factor;
    store_values(a.out, i * a.head_dim, a.head_dim, a.dtype, sum);
  }
}

}  // namespace river
