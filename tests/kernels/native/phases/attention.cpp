// Attention of a few positions, of many (a prompt), and the combination of chunks.
#include <algorithm>

#include "activations.h"
#include "cache.h"

namespace river::checks {
namespace {

enum MaskKind { kNoMask, kCausal, kBoolMask, kAddedMask };

struct Drawn {
  AttentionArgs a{};
  Doubles added;  // [B, T, S], minus infinity where a slot is not read
  Values *keys, *values;
};

// Which slots a position reads: some behind padding, a window of them, any, or none.
void draw_row(Random& r, const AttentionArgs& a, MaskKind kind, int position, double* added) {
  const int first = r.one_in(2) ? 0 : r.between(0, a.slots - 1), width = r.one_in(2) ? a.slots : r.between(1, a.slots);
  const bool holes = r.one_in(3), nothing = r.one_in(12);
  for (int slot = 0; slot < a.slots; ++slot) {
    bool reads = slot >= first && slot < first + width && !nothing && !(holes && r.one_in(3));
    if (kind == kNoMask) reads = true;
    if (kind == kCausal) reads = slot <= position;
    added[slot] = !reads ? -kInfinity : kind == kAddedMask ? r.normal() : 0;
  }
}

// The mask in memory, of all sequences together or of each; `added` becomes what it says once rounded.
void draw_mask(Case& c, Drawn& d, MaskKind kind) {
  AttentionArgs& a = d.a;
  Random& r = c.random;
  const int64_t rows = int64_t(a.batch) * a.positions, shared = kind == kCausal || r.one_in(2) ? a.positions : rows;
  d.added.resize(rows * a.slots);
  for (int64_t row = 0; row < shared; ++row) draw_row(r, a, kind, int(row % a.positions), &d.added[row * a.slots]);
  a.causal = kind == kCausal;
  if (kind >= kBoolMask) {
    a.mask_dtype = kind == kBoolMask ? int32_t(kBool) : r.dtype();
    a.mask_position = a.slots + r.pick({0, 5});
    a.mask_sequence = shared == rows ? a.positions * a.mask_position : 0;
    Values& mask = c.input((shared - 1) * a.mask_position + a.slots, a.mask_dtype);
    const double least = r.one_in(2) ? -kInfinity : a.mask_dtype == kFloat16 ? -65504.0 : -3.38e38;
    for (int64_t i = 0; i < shared * a.slots; ++i) {
      const int64_t at = i / a.slots * a.mask_position + i % a.slots;
      const bool reads = d.added[i] != -kInfinity;
      mask.set(at, kind == kBoolMask ? reads : reads ? d.added[i] : least);
      if (reads && kind == kAddedMask) d.added[i] = mask.at(at);
    }
    a.mask = mask.data();
  }
  for (int64_t i = shared * a.slots; i < rows * a.slots; ++i) d.added[i] = d.added[i - shared * a.slots];
}

// Keys and values, NaN in slots that no position of the sequence reads.
void draw_slots(Case& c, Drawn& d) {
  AttentionArgs& a = d.a;
  const Layout layout = draw_layout(c.random, a.batch, a.kv_heads, a.slots, a.head_dim);
  d.keys = &c.input(layout.count, a.dtype);
  d.values = &c.input(layout.count, a.dtype);
  a.cache = layout.of(*d.keys, *d.values);
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t s = 0; s < a.slots; ++s) {
      bool reads = false;
      for (int64_t t = 0; t < a.positions; ++t) reads |= d.added[(b * a.positions + t) * a.slots + s] != -kInfinity;
      for (int64_t j = 0; reads && j < a.kv_heads; ++j)
        for (int64_t i = 0; i < a.head_dim; ++i) {
          d.keys->set(layout.at(b, j, s) + i, c.random.normal());
          d.values->set(layout.at(b, j, s) + i, c.random.normal());
        }
    }
}

Drawn draw_attention(Case& c, int positions, int most_slots) {
  Random& r = c.random;
  Drawn d;
  AttentionArgs& a = d.a;
  a.dtype = r.dtype();
  a.batch = r.between(1, 2);
  a.positions = positions;
  a.kv_heads = r.between(1, 2);
  a.heads = a.kv_heads * r.pick({1, 2, 3, 4, 9, 14});
  a.head_dim = r.one_in(8) ? r.pick({128, 256}) : r.pick({8, 24, 40, 64, 72});
  a.slots = r.between(1, most_slots);
  a.chunks = ceil_div(a.slots, kChunk);
  a.scale = 1 / std::sqrt(float(a.head_dim));
  a.softcap = r.one_in(3) ? 5.0f : 0.0f;
  draw_mask(c, d, r.pick({kNoMask, kCausal, kBoolMask, kAddedMask}));
  draw_slots(c, d);
  if (r.one_in(2)) {
    a.sinks_dtype = r.dtype();
    a.sinks = c.normal(1, a.heads, 0, a.sinks_dtype, 3).data();
  }
  const int64_t features = int64_t(a.batch) * positions * a.heads * a.head_dim;
  a.q = c.normal(1, features, 0, a.dtype).data();
  a.out = c.output(features, a.dtype).data();
  c.describe("B=", a.batch, " T=", positions, " H=", a.heads, " J=", a.kv_heads, " D=", a.head_dim, " S=", a.slots, " ",
             name_of(a.dtype), " causal=", a.causal, " mask=", a.mask ? name_of(a.mask_dtype) : "none",
             " softcap=", int64_t(a.softcap), " sinks=", a.sinks ? name_of(a.sinks_dtype) : "none");
  return d;
}

// Compares a query's attention; `rounded`: how much less exact the weights of slots are.
void expect_query(Case& c, const Drawn& d, int64_t row, int64_t head, double rounded) {
  const AttentionArgs& a = d.a;
  const int64_t at = (row * a.heads + head) * a.head_dim;
  const int64_t cache = row / a.positions * a.cache.sequence + head / (a.heads / a.kv_heads) * a.cache.head;
  const double* added = &d.added[row * a.slots];
  Doubles scores(a.slots, -kInfinity), out(a.head_dim), magnitudes(a.head_dim);
  double largest = -kInfinity, total = 0, steepest = 1;
  for (int64_t s = 0; s < a.slots; ++s) {
    if (added[s] == -kInfinity) continue;
    double score = 0, magnitude = 0;
    for (int64_t i = 0; i < a.head_dim; ++i) {
      const double product = value_of(a.q, at + i, a.dtype) * d.keys->at(cache + s * a.cache.slot + i) * a.scale;
      score += product;
      magnitude += std::fabs(product);
    }
    scores[s] = (a.softcap > 0 ? std::tanh(score / a.softcap) * a.softcap : score) + added[s];
    largest = std::max(largest, scores[s]);
    steepest = std::max(steepest, 1 + magnitude);
  }
  if (a.sinks && largest != -kInfinity) {
    const double sink = value_of(a.sinks, head, a.sinks_dtype);
    largest = std::max(largest, sink);
    total = std::exp(sink - largest);
  }
  for (int64_t s = 0; s < a.slots; ++s) {
    if (scores[s] == -kInfinity) continue;
    const double weight = std::exp(scores[s] - largest);
    total += weight;
    for (int64_t i = 0; i < a.head_dim; ++i) {
      const double product = weight * d.values->at(cache + s * a.cache.slot + i);
      out[i] += product;
      magnitudes[i] += std::fabs(product);
    }
  }
  for (int64_t i = 0; i < a.head_dim; ++i) {
    const double expected = total == 0 ? 0 : out[i] / total, magnitude = total == 0 ? 0 : magnitudes[i] / total;
    const double allowed = (kSumError * steepest + rounded) * magnitude + rounding_of(a.dtype) * std::fabs(expected);
    c.expect_near("out", at + i, value_of(a.out, at + i, a.dtype), expected, allowed + tiny_of(a.dtype));
  }
}

void expect_attention(Case& c, const Drawn& d, double rounded) {
  for (int64_t row = 0; row < int64_t(d.a.batch) * d.a.positions; ++row)
    for (int64_t head = 0; head < d.a.heads; ++head) expect_query(c, d, row, head, rounded);
}

void run_attention(Case& c, const AttentionArgs& a, int parts) {
  c.run(&Kernels::attend, &a, parts);
  if (a.chunks > 1) c.run(&Kernels::combine, &a, parts);
}

void place_partial(Case& c, AttentionArgs& a) {
  const int64_t partials = int64_t(a.batch) * a.positions * a.heads * a.chunks;
  if (a.chunks > 1) a.partial = c.workspace(partials * (a.head_dim + 2) * 4).data<float>();
}

// Each position of the first sequence alone, with its own mask in place of `causal`, has the same bits.
void expect_positions_alone(Case& c, const Drawn& d) {
  for (int t = 0; t < d.a.positions; ++t) {
    AttentionArgs a = d.a;
    const int64_t size = size_of(a.dtype), features = int64_t(a.heads) * a.head_dim, at = t * features * size;
    Values& mask = c.input(a.slots, kBool);
    for (int64_t s = 0; s < a.slots; ++s) mask.set(s, d.added[t * a.slots + s] != -kInfinity);
    if (a.causal) {
      a.mask = mask.data();
      a.mask_dtype = kBool;
      a.causal = 0;
    } else if (a.mask) {
      a.mask = static_cast<const char*>(a.mask) + t * a.mask_position * size_of(a.mask_dtype);
    }
    a.batch = a.positions = a.together = 1;
    a.q = static_cast<const char*>(a.q) + at;
    a.out = c.output(features, a.dtype).data();
    place_partial(c, a);
    run_attention(c, a, 1);
    c.expect_same_bits("a position's bits depend on the others", a.out, static_cast<const char*>(d.a.out) + at,
                       features * size);
  }
}

// One or several chunks of slots.
void check_attend(Case& c, bool several) {
  Random& r = c.random;
  Drawn d = draw_attention(c, r.one_in(3) ? 1 : r.between(2, 6), several ? 3 * kChunk : kChunk);
  AttentionArgs& a = d.a;
  if (several) a.chunks = std::max(a.chunks, 2);
  a.together = r.between(1, std::clamp(kQueries / (a.heads / a.kv_heads), 1, a.positions));
  c.describe(" together=", a.together);
  place_partial(c, a);
  c.repeat([&](int parts) { run_attention(c, a, parts); });
  expect_attention(c, d, 0);
  expect_positions_alone(c, d);
}

// (Of parts that run one after the other, the first would take all blocks.)
void run_prompt(Case& c, PromptArgs& a, Buffer& memory, int parts) {
  a.taken = memory.data<uint64_t>();
  a.scratch = memory.data<char>() + 64;
  *a.taken = 0;
  c.run_on_threads(&Kernels::attend_prompt, &a, parts);
  c.expect(*a.taken % uint64_t(a.units + parts) == 0, "the next run would not begin with the first block");
}

void check_prompt(Case& c) {
  Drawn d = draw_attention(c, c.random.between(17, 70), 150);
  PromptArgs a = prompt_of(d.a);
  Buffer& memory = c.workspace(64 + 3 * a.scratch_bytes);
  c.repeat([&](int parts) { run_prompt(c, a, memory, parts); });
  expect_attention(c, d, d.a.dtype == kBFloat16 ? rounding_of(kBFloat16) : 0);
  if (d.a.batch == 1) return;
  PromptArgs one = a;  // the first sequence, whose bits do not depend on the other one
  one.of.batch = 1;
  one.units /= a.of.batch;
  const int64_t features = int64_t(d.a.positions) * d.a.heads * d.a.head_dim;
  one.of.out = c.output(features, d.a.dtype).data();
  run_prompt(c, one, memory, 2);
  c.expect_same_bits("a sequence's bits depend on the other one", one.of.out, d.a.out, features * size_of(d.a.dtype));
}

}  // namespace

std::vector<Check> attention_checks() {
  return {
      {"attend", {&Kernels::attend}, 36, [](Case& c) { check_attend(c, false); }},
      {"attend and combine", {&Kernels::attend, &Kernels::combine}, 16, [](Case& c) { check_attend(c, true); }},
      {"attend_prompt", {&Kernels::attend_prompt}, 20, check_prompt},
  };
}

}  // namespace river::checks
