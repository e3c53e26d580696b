// Where a key-value cache keeps its vectors: heads before slots or slots before heads, with or without gaps.
#pragma once

#include "harness.h"

namespace river::checks {

struct Layout {
  int64_t sequence, head, slot, count;  // elements between two of each, and of all

  Cache of(Values& keys, Values& values) const {
    return {keys.data<char>(), values.data<char>(), sequence, head, slot};
  }
  int64_t at(int64_t b, int64_t j, int64_t s) const { return b * sequence + j * head + s * slot; }
};

inline Layout draw_layout(Random& r, int64_t batch, int64_t kv_heads, int64_t slots, int64_t head_dim) {
  const int64_t each = head_dim + r.pick({0, 3}), all = slots * kv_heads * each + r.pick({0, 16});
  Layout layout = r.one_in(2) ? Layout{all, each, kv_heads * each, 0} : Layout{all, slots * each, each, 0};
  layout.count = layout.at(batch - 1, kv_heads - 1, slots - 1) + head_dim;
  return layout;
}

}  // namespace river::checks
