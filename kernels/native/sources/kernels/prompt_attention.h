// Attention of many positions (a prompt) over a static cache, by blocks of positions and chunks of slots, with a
// running maximum and denominator (FlashAttention: Dao et al. 2022). A panel, 16 positions of one query head, is the
// lanes of vectors: scores and sums are transposed, so a softmax sums no lanes. Heads of a key-value head share a
// converted chunk. Chunks hold only slots that some position reads. Matmuls are of float32 or pairs of bfloat16
// (AVX-512 BF16), sums of float32; bits depend on a position's block only. Not handled: tiles (AMX), masks that differ
// between heads, and values that are not finite in a slot that only some positions of a block read.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/attention.h"

namespace river {

// The right operand is panels of 16 columns, the lanes; the left is kLines broadcast lines of words. Calls put(i, p,
// lane, sums) with sum over k of left[i line + k step] right[p][k, lane ...].
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
      unrolled<kVectors>([&](auto v) RIVER_INLINED {
        if constexpr (kPairs)
          sums[i][v] = dot_pairs(sums[i][v], one, lanes[v]);
        else
          sums[i][v] = fma((Floats)one, (Floats)lanes[v], sums[i][v]);
      });
    });
  }
  unrolled<kLines * kVectors>([&](auto i) RIVER_INLINED {
    constexpr int kVector = i % kVectors;
    put(i / kVectors, kVector / kHalves, kVector % kHalves * kLanes, sums[i / kVectors][kVector]);
  });
}

// The work of one part: one block of positions for one key-value head after the other, in memory that it keeps.
template <bool kPairs>
class PromptBlock {
 public:
  PromptBlock(const PromptArgs& args, int part)
      : args_(args),
        a_(args.of),
        features_((a_.head_dim + 15) / 16 * 16),
        words_(features_ / kStep),
        panels_(args.block / kBlock),
        at_(args.scratch + part * args.scratch_bytes),
        q_(take(args.together * panels_ * features_ * kBlock)),
        keys_(take(kPromptChunk * features_)),
        values_(take(kPromptChunk * features_)),
        out_(take_floats(args.together * panels_ * features_ * kBlock)),
        largest_(take_floats(args.together * args.block)),
        total_(take_floats(args.together * args.block)),
        scores_(take_floats(kPanels * kPromptChunk * kBlock)),
        read_(a_, args.block, reinterpret_cast<float*>(at_)) {}

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
    if (place != place_) read_.find(sequence_, first_, positions_);
    place_ = place;
    load_queries();
    const int panels = heads_ * panels_;
    std::fill(out_, out_ + panels * features_ * kBlock, 0.0f);
    for (int panel = 0; panel < panels; ++panel) begin_sums(panel);
    for (read_.rewind(); read_.next();) {
      load_chunk(sequence_ * a_.cache.sequence + kv_head * a_.cache.head);
      in_batches<kPanels>(panels, [&](auto count, int panel, int, int) { attend_panels<count>(panel); });
    }
    store_result();
  }

 private:
  static constexpr int kStep = kPairs ? 2 : 1;  // slots of a word

  uint32_t* take(int64_t words) {
    at_ += words * 4;
    return reinterpret_cast<uint32_t*>(at_) - words;
  }
  float* take_floats(int64_t count) { return reinterpret_cast<float*>(take(count)); }

  // Calls f(panel, where its first position's features begin, how many positions it has).
  template <class F>
  void each_panel(const F& f) {
    for (int panel = 0; panel < heads_ * panels_; ++panel) {
      const int position = panel % panels_ * kBlock;
      const int64_t row = sequence_ * a_.positions + first_ + position;
      f(panel, (row * a_.heads + head_ + panel / panels_) * a_.head_dim, std::min(kBlock, positions_ - position));
    }
  }

  // A sink is a score that came before all slots. (Its value is 0, so sums begin with 0.)
  void begin_sums(int panel) {
    constexpr float kLowest = std::numeric_limits<float>::lowest();
    const float sink = a_.sinks ? load_scalar(a_.sinks, head_ + panel / panels_, a_.sinks_dtype) : kLowest;
    std::fill_n(largest_ + panel * kBlock, kBlock, sink < kLowest ? kLowest : sink);
    std::fill_n(total_ + panel * kBlock, kBlock, a_.sinks && sink >= kLowest ? 1.0f : 0.0f);
  }

  void load_queries() {
    constexpr int kWidth = kPairs ? 2 * kBlock : kBlock;  // features of a block of words
    const int64_t stride = int64_t(a_.heads) * a_.head_dim;
    each_panel([&](int panel, int64_t at, int rows) {
      for (int d = 0; d < a_.head_dim; d += kWidth) {
        alignas(64) uint32_t words[kBlock * kBlock] = {}, turned[kBlock * kBlock];
        const int features = std::min(kWidth, a_.head_dim - d), first = d / kStep;
        for (int i = 0; i < rows; ++i) {
          if (kPairs)
            std::memcpy(words + i * kBlock, static_cast<const uint16_t*>(a_.q) + at + i * stride + d, features * 2);
          else
            load_values(a_.q, at + i * stride + d, features, a_.dtype, reinterpret_cast<float*>(words) + i * kBlock);
        }
        transpose(words, kBlock, turned);
        std::copy(turned, turned + std::min(kBlock, words_ - first) * kBlock, q_ + (panel * words_ + first) * kBlock);
      }
    });
  }

  void load_chunk(int64_t cache) {
    const int features = a_.head_dim, count = read_.count;
    for (int i = 0; i < count; ++i) {
      const int64_t at = cache + read_.slots[i] * a_.cache.slot;
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
        load_filled(a_.cache.keys, at, features, features_, a_.dtype, reinterpret_cast<float*>(key));
        load_filled(a_.cache.values, at, features, features_, a_.dtype, reinterpret_cast<float*>(value));
      }
    }
  }

  // Turns the scores of one panel into weights, in place as words, and returns by what earlier sums shrink.
  void weigh(int panel, float* scores, float* factor) {
    const int count = read_.count, block = args_.block;
    const float scale = a_.scale, softcap = a_.softcap;
    const bool masked = read_.masked;
    for (int lane = 0; lane < kBlock; lane += kLanes) {
      float* const largest_at = largest_ + panel * kBlock + lane;
      const Floats before = load_floats(largest_at);
      Floats largest = before;
      const float* added = read_.added() + panel % panels_ * kBlock + lane;
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
    const int count = read_.count;
    for (int i = 0; i < count; i += kLines)
      multiply<kPairs, P>(keys_ + i * words_, words_, 1, q_ + panel * words_ * kBlock, words_ * kBlock, words_,
                          [&](int j, int p, int lane, Floats sum)
                              RIVER_INLINED { store(scores_ + p * kPanel + (i + j) * kBlock + lane, sum); });
    alignas(64) float factors[P * kBlock];
    for (int p = 0; p < P; ++p) weigh(panel + p, scores_ + p * kPanel, factors + p * kBlock);
    for (int d = 0; d < features_; d += kLines)
      multiply<kPairs, P>(values_ + d, 1, features_, reinterpret_cast<uint32_t*>(scores_), kPanel,
                          (count + kStep - 1) / kStep, [&](int j, int p, int lane, Floats sum) RIVER_INLINED {
                            float* out = out_ + ((panel + p) * features_ + d + j) * kBlock + lane;
                            store(out, fma(load_floats(out), load_floats(factors + p * kBlock + lane), sum));
                          });
  }

  void store_result() {
    const int64_t stride = int64_t(a_.heads) * a_.head_dim;
    each_panel([&](int panel, int64_t at, int rows) {
      for (int d = 0; d < a_.head_dim && rows > 0; d += kBlock) {
        alignas(64) float turned[kBlock * kBlock];
        transpose(out_ + (panel * features_ + d) * kBlock, kBlock, turned);
        for (int i = 0; i < rows; ++i) {
          const float total = total_[panel * kBlock + i], factor = total == 0 ? 0.0f : 1.0f / total;
          for (int j = 0; j < kBlock; ++j) turned[i * kBlock + j] *= factor;
        }
        store_block(a_.out, at + d, stride, rows, std::min(kBlock, a_.head_dim - d), a_.dtype, turned);
      }
    });
  }

  const PromptArgs& args_;
  const AttentionArgs& a_;
  const int features_, words_;           // of a head, filled up with zeros
  const int panels_;                     // of a query head
  char* at_;                             // what is left of the part's memory
  uint32_t* const q_;                    // [panel, word, 16]
  uint32_t* const keys_;                 // [slot, word]
  uint32_t* const values_;               // [slots of a word, feature]
  float* const out_;                     // [panel, feature, 16]
  float *const largest_, *const total_;  // [panel, 16]
  float* const scores_;                  // [panels of one product, slot, 16]
  SlotsOfBlock read_;
  int64_t place_ = -1, sequence_ = 0, head_ = 0;
  int first_ = 0, positions_ = 0, heads_ = 0;
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
  // (Without such products nothing of theirs is instantiated.)
  if (kHasPairs && a.of.dtype == kBFloat16)
    attend_all(PromptBlock<kHasPairs>(a, part));
  else
    attend_all(PromptBlock<false>(a, part));
}

}  // namespace river
