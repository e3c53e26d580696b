// Attention of many query positions (a prompt) over a static cache: blocks of positions meet the slots that take part
// in chunks, with a running maximum and denominator (FlashAttention: Dao et al. 2022).
//
// A panel is 16 positions of one query head, which are the lanes of vectors: scores and sums lie transposed, [slot,
// position] and [feature, position], so that a softmax needs no sum across lanes, and keys and values are broadcast
// from rows as they lie in the cache. Panels of all heads that share a key-value head read a chunk once it is converted.
// A chunk holds slots that some position of the block takes part in, so what no position reads costs nothing and is
// never read. Products are of float32, or of pairs of bfloat16 where the processor has them (AVX-512 BF16); sums and
// the softmax are of float32. A position's bits depend on its block alone, not on threads.
//
// Not handled: tiles (AMX), masks that differ between heads, and values that are not finite in a slot which only some
// positions of a block read (they reach all of these).
#pragma once

#include <algorithm>
#include <limits>

#include "attention.h"
#include "functions.h"
#include "phases.h"
#include "scalars.h"
#include "transpose.h"
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

// Calls put(i, p, lane, sums) with sum over k of left[i line + k step] right[p][k, lane ...] for all lines and P panels.
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

// The work of one part: one block of positions for one key-value head after the other, in memory that it keeps.
template <bool kPairs>
class PromptBlock {
 public:
  PromptBlock(const PromptArgs& args, int part)
      : args_(args), a_(args.of), features_((a_.head_dim + 15) / 16 * 16), words_(kPairs ? features_ / 2 : features_) {
    char* at = args.scratch + part * args.scratch_bytes;
    const auto take = [&](int64_t words) {
      void* taken = at;
      at += words * 4;
      return taken;
    };
    const int64_t panels = int64_t(args.together) * args.block / kBlock;
    q_ = static_cast<uint32_t*>(take(panels * features_ * kBlock));
    out_ = static_cast<float*>(take(panels * features_ * kBlock));
    largest_ = static_cast<float*>(take(panels * kBlock));
    total_ = static_cast<float*>(take(panels * kBlock));
    keys_ = static_cast<uint32_t*>(take(kPromptChunk * features_));
    values_ = static_cast<uint32_t*>(take(kPromptChunk * features_));
    scores_ = static_cast<float*>(take(3 * kPromptChunk * kBlock));
    added_ = static_cast<float*>(take(int64_t(kPromptChunk) * args.block));
    readers_ = reinterpret_cast<uint8_t*>(at);
  }

  // Numbers begin with the last positions, which have the most slots to read.
  void attend(int64_t number) {
    const int shared = a_.heads / a_.kv_heads, groups = (shared + args_.together - 1) / args_.together;
    const int64_t inner = int64_t(a_.kv_heads) * groups, blocks = (a_.positions + args_.block - 1) / args_.block;
    const int64_t place = number / inner, kv_head = number % inner / groups, group = number % groups;
    sequence_ = place % a_.batch;
    first_ = int(blocks - 1 - place / a_.batch) * args_.block;
    positions_ = std::min(args_.block, a_.positions - first_);
    const int begin = int(shared * group / groups);
    heads_ = int(shared * (group + 1) / groups) - begin;
    head_ = kv_head * shared + begin;
    if (place != place_) find_readers();
    place_ = place;
    load_queries();
    const int panels = heads_ * args_.block / kBlock;
    std::fill(out_, out_ + panels * features_ * kBlock, 0.0f);
    std::fill(largest_, largest_ + panels * kBlock, std::numeric_limits<float>::lowest());
    std::fill(total_, total_ + panels * kBlock, 0.0f);
    for (int next = begin_; next < end_;) {
      next = find_chunk(next);
      load_chunk(sequence_ * a_.cache.sequence + kv_head * a_.cache.head);
      if (masked_) load_mask();
      const int shares = (panels + kPanels - 1) / kPanels;
      for (int share = 0; share < shares; ++share) {
        const int panel = panels * share / shares, count = panels * (share + 1) / shares - panel;
        if (count == 1) attend_panels<1>(panel);
        if constexpr (kPanels >= 2)
          if (count == 2) attend_panels<2>(panel);
        if constexpr (kPanels >= 3)
          if (count == 3) attend_panels<3>(panel);
      }
    }
    store_result();
  }

 private:
  static constexpr int kStep = kPairs ? 2 : 1;  // slots of a word

  // Counts the positions of the block that read each slot, 128 beside it where the mask adds to the scores.
  void find_readers() {
    const int last = first_ + positions_, slots = a_.causal ? std::min(a_.slots, last) : a_.slots;
    uint8_t* const readers = readers_;
    begin_ = 0;
    end_ = slots;
    if (a_.causal || !a_.mask) {
      for (int slot = 0; slot < slots; ++slot)
        readers[slot] = uint8_t(a_.causal ? std::min(positions_, last - slot) : positions_);
      return;
    }
    std::fill(readers, readers + slots, 0);
    for (int position = first_; position < last; ++position) {
      const int64_t at = sequence_ * a_.mask_sequence + position * a_.mask_position;
      if (a_.mask_dtype == kBool) {
        const auto* mask = static_cast<const uint8_t*>(a_.mask) + at;
        for (int slot = 0; slot < slots; ++slot) readers[slot] += mask[slot];
        continue;
      }
      for (int slot = 0; slot < slots; ++slot) {
        float added;
        const uint8_t reads = takes_part(a_, at, slot, added);
        readers[slot] = uint8_t((readers[slot] + reads) | (reads && added != 0 ? 128 : 0));
      }
    }
    const auto some = [&](int slot) {  // of eight
      uint64_t eight;
      std::memcpy(&eight, readers + slot, 8);
      return eight != 0;
    };
    while (end_ >= 8 && !some(end_ - 8)) end_ -= 8;
    while (begin_ + 8 <= end_ && !some(begin_)) begin_ += 8;
  }

  // Lists the next slots that take part, and returns where to go on.
  int find_chunk(int slot) {
    count_ = 0;
    masked_ = false;
    for (; slot < end_ && count_ < kPromptChunk; ++slot) {
      if (!readers_[slot]) continue;
      slots_[count_++] = slot;
      masked_ |= readers_[slot] != positions_;
    }
    return slot;
  }

  void load_queries() {
    const int64_t stride = int64_t(a_.heads) * a_.head_dim;
    const int panels = args_.block / kBlock, width = kPairs ? 2 * kBlock : kBlock;  // features of a block of words
    for (int panel = 0; panel < heads_ * panels; ++panel) {
      const int position = panel % panels * kBlock, rows = std::min(kBlock, positions_ - position);
      const int64_t at = (sequence_ * a_.positions + first_ + position) * stride + (head_ + panel / panels) * a_.head_dim;
      for (int d = 0; d < a_.head_dim; d += width) {
        alignas(64) uint32_t words[2 * kBlock * kBlock] = {}, turned[kBlock * kBlock];
        const int features = std::min(width, a_.head_dim - d);
        for (int i = 0; i < rows; ++i) {
          if (kPairs)
            std::memcpy(words + i * kBlock, static_cast<const uint16_t*>(a_.q) + at + i * stride + d, features * 2);
          else
            load_values(a_.q, at + i * stride + d, features, a_.dtype, reinterpret_cast<float*>(words) + i * kBlock);
        }
        transpose(words, kBlock, turned);
        const int first = d / kStep, last = std::min(first + kBlock, words_);
        std::copy(turned, turned + (last - first) * kBlock, q_ + (panel * words_ + first) * kBlock);
      }
    }
  }

  void load_chunk(int64_t cache) {
    const int features = a_.head_dim, count = count_;
    for (int i = 0; i < count; ++i) {
      const int64_t at = cache + slots_[i] * a_.cache.slot;
      uint32_t* key = keys_ + i * words_;
      uint32_t* value = values_ + i / kStep * features_;
      if constexpr (kPairs) {
        const auto* from = reinterpret_cast<const uint16_t*>(a_.cache.values) + at;
        std::memset(key, 0, words_ * 4);
        std::memcpy(key, reinterpret_cast<const uint16_t*>(a_.cache.keys) + at, features * 2);
        if (i % 2)
          for (int d = 0; d < features; ++d) value[d] |= uint32_t(from[d]) << 16;
        else
          for (int d = 0; d < features; ++d) value[d] = from[d];
      } else {
        load_head(a_.cache.keys, at, a_, reinterpret_cast<float*>(key));
        load_head(a_.cache.values, at, a_, reinterpret_cast<float*>(value));
      }
    }
  }

  // What is added to the scores, [slot, position]; -inf where a position does not read a slot.
  void load_mask() {
    const int count = count_, block = args_.block;
    for (int i = 0; i < positions_; ++i) {
      const int64_t position = first_ + i, at = sequence_ * a_.mask_sequence + position * a_.mask_position;
      float* const to = added_ + i;
      if (a_.mask && a_.mask_dtype == kBool) {
        const auto* mask = static_cast<const uint8_t*>(a_.mask) + at;
        for (int j = 0; j < count; ++j) to[j * block] = mask[slots_[j]] ? 0.0f : kMinusInfinity;
        continue;
      }
      for (int j = 0; j < count; ++j) {
        float added = 0;
        const bool reads = a_.causal ? slots_[j] <= position : takes_part(a_, at, slots_[j], added);
        to[j * block] = reads ? added : kMinusInfinity;
      }
    }
  }

  // Turns the scores of one panel into weights, in place as words, and returns by what earlier sums shrink.
  void weigh(int panel, float* scores, float* factor) {
    const int count = count_, block = args_.block;
    const float scale = a_.scale, softcap = a_.softcap;
    const bool masked = masked_;
    for (int lane = 0; lane < kBlock; lane += kLanes) {
      float* const largest_at = largest_ + panel * kBlock + lane;
      const Floats before = load_floats(largest_at);
      Floats largest = before;
      const float* added = added_ + panel % (block / kBlock) * kBlock + lane;
      for (int i = 0; i < count; ++i) {
        Floats s = load_floats(scores + i * kBlock + lane) * scale;
        if (softcap > 0) s = tanh_of(s / softcap) * softcap;
        if (masked) {
          const Floats by = load_floats(added + i * block);
          s = by == kMinusInfinity ? by : s + by;  // (of a slot that is not read, s may be NaN)
        }
        largest = s > largest ? s : largest;
        store(scores + i * kBlock + lane, s);
      }
      const auto weight_of = [&](int i) RIVER_INLINED {
        const Floats s = load_floats(scores + i * kBlock + lane);
        return s == kMinusInfinity ? zeros() : exp_of(s - largest);  // (NaN stays NaN)
      };
      const Floats shrunk = exp_of(before - largest);
      Floats total = load_floats(total_ + panel * kBlock + lane) * shrunk;
      for (int i = 0; i < count; i += kStep) {
        const Floats even = weight_of(i);
        total = total + even;
        if constexpr (kPairs) {
          const Floats odd = i + 1 < count ? weight_of(i + 1) : zeros();
          total = total + odd;
          store_pairs(even, odd, reinterpret_cast<uint32_t*>(scores) + i / 2 * kBlock + lane);
        } else {
          store(scores + i * kBlock + lane, even);
        }
      }
      store(largest_at, largest);
      store(total_ + panel * kBlock + lane, total);
      store(factor + lane, shrunk);
    }
  }

  template <int P>
  void attend_panels(int panel) {
    constexpr int kPanel = kPromptChunk * kBlock;
    for (int i = 0; i < count_; i += kLines)
      multiply<kPairs, P>(keys_ + i * words_, words_, 1, q_ + panel * words_ * kBlock, words_ * kBlock, words_,
                          [&](int j, int p, int lane, Floats sum)
                              RIVER_INLINED { store(scores_ + p * kPanel + (i + j) * kBlock + lane, sum); });
    alignas(64) float factors[P * kBlock];
    for (int p = 0; p < P; ++p) weigh(panel + p, scores_ + p * kPanel, factors + p * kBlock);
    for (int d = 0; d < features_; d += kLines)
      multiply<kPairs, P>(values_ + d, 1, features_, reinterpret_cast<uint32_t*>(scores_), kPanel,
                          (count_ + kStep - 1) / kStep, [&](int j, int p, int lane, Floats sum) RIVER_INLINED {
                            float* out = out_ + ((panel + p) * features_ + d + j) * kBlock + lane;
                            store(out, fma(load_floats(out), load_floats(factors + p * kBlock + lane), sum));
                          });
  }

  void store_result() {
    const int64_t stride = int64_t(a_.heads) * a_.head_dim;
    const int panels = args_.block / kBlock;
    for (int panel = 0; panel < heads_ * panels; ++panel) {
      const int position = panel % panels * kBlock, rows = std::min(kBlock, positions_ - position);
      const int64_t at = (sequence_ * a_.positions + first_ + position) * stride + (head_ + panel / panels) * a_.head_dim;
      for (int d = 0; d < a_.head_dim; d += kBlock) {
        alignas(64) float turned[kBlock * kBlock];
        transpose(out_ + (panel * features_ + d) * kBlock, kBlock, turned);
        for (int i = 0; i < rows; ++i) {
          const float total = total_[panel * kBlock + i], factor = total == 0 ? 0.0f : 1.0f / total;
          for (int j = 0; j < kBlock; ++j) turned[i * kBlock + j] *= factor;
        }
        if (rows > 0)
          store_block(a_.out, at + d, stride, rows, std::min(kBlock, a_.head_dim - d), a_.dtype, turned);
      }
    }
  }

  const PromptArgs& args_;
  const AttentionArgs& a_;
  const int features_, words_;  // of a head, filled up with zeros
  uint32_t *q_, *keys_, *values_;  // [panel, word, 16], [slot, word], [slots of a word, feature]
  float *out_, *largest_, *total_, *scores_, *added_;  // [panel, feature, 16], [panel, 16], [panel, slot, 16]
  uint8_t* readers_;
  int64_t place_ = -1, sequence_, head_;
  int first_, positions_, heads_, begin_, end_, count_;
  int32_t slots_[kPromptChunk];
  bool masked_;
};

inline void attend_prompt(const void* args, int part, int parts) {
  const auto& a = *static_cast<const PromptArgs*>(args);
  const auto attend_all = [&](auto block) {
    // (All parts together take `units` numbers and, to see that there are no more, one each: the next run begins at 0.)
    while (true) {
      const auto number = int64_t(__atomic_fetch_add(a.taken, 1, __ATOMIC_RELAXED) % uint64_t(a.units + parts));
      if (number >= a.units) return;
      block.attend(number);
    }
  };
#if defined(RIVER_ISA_AVX512_BF16)
  if (a.of.dtype == kBFloat16) return attend_all(PromptBlock<true>(a, part));
#endif
  attend_all(PromptBlock<false>(a, part));
}

}  // namespace river
