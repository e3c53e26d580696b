// The largest logits recomputed from the head's own weight after a 4-bit matmul. The `kBlocksAnew` th largest maximum
// of blocks of 64 is the least logit to recompute (`kBlocksOfSome` if some are masked; those stay). NaN stays too.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>

#include "vectors/vector_math.h"

namespace river {

constexpr int kBlocksAnew = 256, kBlocksOfSome = 16;

// One row's logits, of which this part looks at all and writes a share: blocks to recompute are dealt out in turn,
// since frequent tokens have low numbers.
class RowOfLogits {
 public:
  RowOfLogits(const RescoreArgs& a, int64_t row, float* largest)
      : a_(a), row_(row), blocks_(ceil_div(a.out_features, kBlockOfLogits)), largest_(largest) {
    for (int64_t block = 0; block < blocks_; ++block) {
      std::fill(values_ + load(block), values_ + kBlockOfLogits, -INFINITY);
      largest_[block] = largest_of(values_);
    }
    float* const ordered = largest_ + blocks_;
    float* const end = std::copy_if(largest_, largest_ + blocks_, ordered, [](float l) { return l > kMaskedLogit; });
    const bool all = end - ordered == blocks_;
    const int anew = all ? kBlocksAnew : kBlocksOfSome;
    if (!all) least_ = std::nextafter(kMaskedLogit, 0.0f);
    if (end - ordered <= anew) return;
    std::nth_element(ordered, ordered + anew - 1, end, std::greater<>());
    least_ = ordered[anew - 1];
  }

  void write(int way, int ways) {
    each_anew(way, ways, [&](int64_t block) {
      each_largest(block, [&](int, const char* weight) {
        for (int64_t byte = 0; byte < row_bytes(); byte += 64) __builtin_prefetch(weight + byte, 0, 2);
      });
    });
    for (auto [block, end] = share_of(blocks_, way, ways); block < end; ++block)
      if (!is_anew(block)) store(block, load(block));
    each_anew(way, ways, [&](int64_t block) {
      const int count = each_largest(block, [&](int i, const char* weight) { values_[i] = product(weight, block, i); });
      store(block, count);
    });
  }

 private:
  // (Lane by lane: compilers make no vectors of a maximum over one row.)
  static float largest_of(const float* values) {
    float lanes[16];
    std::copy(values, values + 16, lanes);
    for (int i = 16; i < kBlockOfLogits; i += 16)
      for (int j = 0; j < 16; ++j) lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
    float most = -INFINITY;
    for (const float lane : lanes) most = lane > most ? lane : most;
    return most;
  }

  int64_t row_bytes() const { return a_.in_features * bytes_of(a_.dtype); }

  int load(int64_t block) {
    const int64_t first = block * kBlockOfLogits;
    const int count = int(std::min<int64_t>(kBlockOfLogits, a_.out_features - first));
    load_values(a_.logits.data, row_ * a_.logits.stride + first, count, a_.dtype, values_);
    return count;
  }

  void store(int64_t block, int count) {
    store_values(a_.y, row_ * a_.out_features + block * kBlockOfLogits, count, a_.dtype, values_);
  }

  bool is_anew(int64_t block) const { return !(largest_[block] < least_); }

  // Calls f(block) for this part's blocks to recompute.
  template <class F>
  void each_anew(int way, int ways, const F& f) {
    int turn = 0;
    for (int64_t block = 0; block < blocks_; ++block)
      if (is_anew(block) && turn++ % ways == way) f(block);
  }

  // Calls f(number, weight) for the block's logits to recompute, whose values may change meanwhile; returns how many
  // the block has.
  template <class F>
  int each_largest(int64_t block, const F& f) {
    const int count = load(block);
    const char* weight = static_cast<const char*>(a_.weight) + block * kBlockOfLogits * row_bytes();
    for (int i = 0; i < count; ++i)
      if (values_[i] >= least_) f(i, weight + i * row_bytes());
    return count;
  }

  float product(const char* weight, int64_t block, int i) const {
    constexpr int kFeatures = 256;
    alignas(64) float w[kFeatures];
    const auto* x = static_cast<const float*>(a_.x.values) + row_ * a_.padded_features;
    float sum = a_.bias ? load_scalar(a_.bias, block * kBlockOfLogits + i, a_.dtype) : 0.0f;
    for (int first = 0; first < a_.in_features; first += kFeatures) {
      const int count = std::min(kFeatures, a_.in_features - first), padded = (count + 15) / 16 * 16;
      load_filled(weight, first, count, padded, a_.dtype, w);
      sum += dot_of(w, x + first, padded);
    }
    return sum;
  }

  const RescoreArgs& a_;
  const int64_t row_, blocks_;
  float* const largest_;
  float least_ = -INFINITY;
  alignas(64) float values_[kBlockOfLogits];
};

inline void rescore(const void* args, int part, int parts) {
  const auto& a = *static_cast<const RescoreArgs*>(args);
  float* const largest = a.largest + 2 * ceil_div(a.out_features, kBlockOfLogits) * int64_t(part);
  for (auto [i, end] = share_of(int64_t(a.rows) * a.ways, part, parts); i < end; ++i)
    RowOfLogits(a, i / a.ways, largest).write(int(i % a.ways), a.ways);
}

}  // namespace river
