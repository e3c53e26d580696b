// The slots of a static cache that a mask lets positions read, and its additions to their scores.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "vectors/dtypes.h"

namespace river {

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

// The end of a stretch of slots from number `slot` on whose numbers in the mask's row at `at` are equal; perhaps before
// its real end. (Masks are long stretches, and memory is compared much faster than numbers are looked at.)
inline int alike_until(const AttentionArgs& a, int64_t at, int slot, int last) {
  if (!a.mask) return last;
  const int64_t each = a.mask_dtype == kBool ? 1 : bytes_of(a.mask_dtype);
  const char* const mask = static_cast<const char*>(a.mask) + at * each;
  int end = slot + 1;
  for (const int step : {64, 8})
    while (end + step <= last && !std::memcmp(mask + (end - 1) * each, mask + end * each, step * each)) end += step;
  return end;
}

// The first unmasked slot of a row, `slots` without one; padding or a window may put it far behind.
inline int first_live(const AttentionArgs& a, int64_t at, int slots) {
  if (a.mask && a.mask_dtype == kBool) {
    const void* mask = static_cast<const uint8_t*>(a.mask) + at;
    const void* found = std::memchr(mask, 1, slots);
    return found ? int(static_cast<const uint8_t*>(found) - static_cast<const uint8_t*>(mask)) : slots;
  }
  float added;
  int first = 0;
  while (first < slots && !takes_part(a, at, first, added)) first = alike_until(a, at, first, slots);
  return first;
}

// Finds those of chunk number `chunk` of a row.
inline void find_live(const AttentionArgs& a, int64_t row, int chunk, Live& live) {
  const int64_t at = row / a.positions * a.mask_sequence + row % a.positions * a.mask_position;
  const int slots = a.causal ? int(std::min<int64_t>(a.slots, row % a.positions + 1)) : a.slots;
  const int first = first_live(a, at, slots) + chunk * kChunk;
  const int last = std::min(first + kChunk, slots);
  float added;
  for (int slot = first, end; slot < last; slot = end) {
    end = alike_until(a, at, slot, last);
    if (!takes_part(a, at, slot, added)) continue;
    std::fill_n(live.added + live.count, end - slot, added);
    for (; slot < end; ++slot) live.slots[live.count++] = slot;
  }
  for (int i = live.count; i % 16; ++i) live.added[i] = 0;
}

// The slots that some position of a block reads, in chunks.
class SlotsOfBlock {
 public:
  // `memory` has room for kPromptChunk times `block` floats, and a byte for each slot of the cache.
  SlotsOfBlock(const AttentionArgs& a, int block, float* memory)
      : a_(a), block_(block), added_(memory), readers_(reinterpret_cast<uint8_t*>(memory + kPromptChunk * block)) {}

  // Turns to the positions `first` to `first + positions - 1` of a sequence.
  void find(int64_t sequence, int first, int positions) {
    mask_ = sequence * a_.mask_sequence;
    first_ = first;
    positions_ = positions;
    const int last = first + positions, slots = a_.causal ? std::min(a_.slots, last) : a_.slots;
    begin_ = 0;
    end_ = slots;
    if (a_.mask) return count_readers(last);
    for (int slot = 0; slot < slots; ++slot)
      readers_[slot] = uint8_t(a_.causal ? std::min(positions, last - slot) : positions);
  }

  void rewind() { next_ = begin_; }

  // Lists the next slots that some position reads, and returns whether there are any.
  bool next() {
    count = 0;
    masked = false;
    for (; next_ < end_ && count < kPromptChunk; ++next_) {
      if (!readers_[next_]) continue;
      slots[count++] = next_;
      masked |= readers_[next_] != positions_;
    }
    if (masked) find_added();
    return count > 0;
  }

  int32_t slots[kPromptChunk], count;
  bool masked;  // whether a position reads not all of these slots, or the mask adds to its scores

  // [slot of the chunk, position of the block], -inf where it is not read. Of chunks that are masked alone.
  const float* added() const { return added_; }

 private:
  // Counts the positions of the block that read each slot, plus 128 where the mask adds to the scores.
  void count_readers(int last) {
    uint8_t* const readers = readers_;  // (which the compiler would read again for every byte)
    const int slots = end_;
    std::fill(readers, readers + slots, 0);
    for (int position = first_; position < last; ++position) {
      const int64_t at = mask_ + position * a_.mask_position;
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

  void find_added() {
    for (int i = 0; i < positions_; ++i) {
      const int64_t position = first_ + i, at = mask_ + position * a_.mask_position;
      float* const to = added_ + i;
      if (a_.mask && a_.mask_dtype == kBool) {
        const auto* mask = static_cast<const uint8_t*>(a_.mask) + at;
        for (int j = 0; j < count; ++j) to[j * block_] = mask[slots[j]] ? 0.0f : kMinusInfinity;
        continue;
      }
      for (int j = 0; j < count; ++j) {
        float added = 0;
        const bool reads = a_.causal ? slots[j] <= position : takes_part(a_, at, slots[j], added);
        to[j * block_] = reads ? added : kMinusInfinity;
      }
    }
  }

  const AttentionArgs& a_;
  const int block_;
  float* const added_;
  uint8_t* const readers_;
  int64_t mask_ = 0;
  int first_ = 0, positions_ = 0, begin_ = 0, end_ = 0, next_ = 0;
};

}  // namespace river
