// Positions of q|k|v on their way to the key-value cache.
#include "cache.h"

#include "activations.h"

namespace river::checks {
namespace {

// A head after its norm and its rotation, and the magnitudes that it was added up from.
struct Head {
  Doubles values, magnitudes;
};

void rotate(const KvFillArgs& a, int64_t row, Head& h) {
  const int64_t at = row / a.positions * a.rotary_sequence + row % a.positions * a.rotary_position;
  for (int64_t i = 0; i < a.rotary_dim / 2; ++i) {
    const int64_t first = a.interleaved ? 2 * i : i, second = a.interleaved ? 2 * i + 1 : i + a.rotary_dim / 2;
    const double x = h.values[first], y = h.values[second];
    const auto turn = [&](int64_t k, double mine, double other) {
      const int64_t angle = at + (a.half_tables ? i : k);
      const double cos = value_of(a.cos, angle, a.rotary_dtype), sin = value_of(a.sin, angle, a.rotary_dtype);
      h.values[k] = mine * cos + other * sin;
      h.magnitudes[k] = std::fabs(mine * cos) + std::fabs(other * sin);
    };
    turn(first, x, -y);
    turn(second, y, x);
  }
}

// `norm_weight` is null for values, which are neither normalised nor rotated.
Head head_of(const KvFillArgs& a, int64_t row, int64_t head, bool is_value, const void* norm_weight) {
  const int64_t d = a.head_dim;
  Head h{Doubles(d), Doubles(d)};
  double squares = 0;
  for (int64_t i = 0; i < d; ++i) {
    h.values[i] = value_of(a.qkv.data, row * a.qkv.stride + head * d + i, a.dtype);
    squares += h.values[i] * h.values[i];
  }
  const double factor = 1 / std::sqrt(squares / double(d) + a.eps), plus = a.norm == kRmsPlusOne;
  for (int64_t i = 0; i < d; ++i) {
    if (!is_value && a.norm) h.values[i] *= factor * (value_of(norm_weight, i, a.dtype) + plus);
    h.magnitudes[i] = std::fabs(h.values[i]);
  }
  if (!is_value && a.cos) rotate(a, row, h);
  return h;
}

KvFillArgs draw_fill(Case& c) {
  Random& r = c.random;
  KvFillArgs a{};
  a.batch = r.between(1, 3);
  a.positions = r.one_in(2) ? 1 : r.between(2, 20);
  a.kv_heads = r.between(1, 3);
  a.heads = a.kv_heads * r.between(1, 4);
  a.head_dim = r.pick({8, 16, 40, 64, 80, 128});
  a.slots = r.between(a.positions, 30);
  a.dtype = r.dtype();
  a.norm = r.between(kNoNorm, kRmsPlusOne);
  a.eps = 1e-5f;
  a.interleaved = r.one_in(2);
  const int64_t features = int64_t(a.heads + 2 * a.kv_heads) * a.head_dim, stride = features + r.pick({0, 9});
  a.qkv = {c.normal(a.batch * a.positions, features, stride, a.dtype).data(), stride};
  if (a.norm) a.q_norm = c.normal(1, a.head_dim, 0, a.dtype).data();
  if (a.norm) a.k_norm = c.normal(1, a.head_dim, 0, a.dtype).data();
  if (r.one_in(4)) return a;
  a.rotary_dim = r.one_in(3) ? a.head_dim / 2 : a.head_dim;
  a.rotary_dtype = r.pick({int32_t(kFloat32), a.dtype});
  a.half_tables = r.one_in(3);
  const int64_t columns = a.half_tables ? a.rotary_dim / 2 : a.rotary_dim;
  a.rotary_position = columns + r.pick({0, 4});
  const int64_t rows = a.positions * (r.one_in(2) ? 1 : a.batch);
  a.rotary_sequence = rows == a.positions ? 0 : a.positions * a.rotary_position;
  a.cos = c.normal(rows, columns, a.rotary_position, a.rotary_dtype).data();
  a.sin = c.normal(rows, columns, a.rotary_position, a.rotary_dtype).data();
  return a;
}

// Distinct slots, in disorder, of which some lie outside of the cache.
std::vector<int64_t> draw_slots(Case& c, KvFillArgs& a) {
  Random& r = c.random;
  const int64_t first = r.between(0, a.slots - 1);
  std::vector<int64_t> slots(a.positions);
  for (int64_t t = 0; t < a.positions; ++t) {
    slots[t] = (first + a.positions - t) % a.slots;
    if (r.one_in(5)) slots[t] = r.pick({int64_t(-1), int64_t(a.slots), int64_t(a.slots) + 7});
  }
  a.slot_bytes = r.pick({4, 8});
  Buffer& memory = c.input_of(a.positions * a.slot_bytes);
  for (int64_t t = 0; t < a.positions; ++t)
    if (a.slot_bytes == 8)
      memory.data<int64_t>()[t] = slots[t];
    else
      memory.data<int32_t>()[t] = int32_t(slots[t]);
  a.slot = memory.data();
  return slots;
}

void expect_head(Case& c, const KvFillArgs& a, const Head& head, Values& found, int64_t at) {
  for (int64_t i = 0; i < a.head_dim; ++i) {
    const double expected = head.values[i];
    const double allowed =
        kSumError * head.magnitudes[i] + rounding_of(a.dtype) * std::fabs(expected) + tiny_of(a.dtype);
    c.expect_near("element", at + i, found.at(at + i), expected, allowed);
  }
}

void check_kv_fill(Case& c) {
  KvFillArgs a = draw_fill(c);
  const std::vector<int64_t> slots = draw_slots(c, a);
  const Layout layout = draw_layout(c.random, a.batch, a.kv_heads, a.slots, a.head_dim);
  Values &keys = c.output(layout.count, a.dtype), &values = c.output(layout.count, a.dtype);
  Values& q = c.output(int64_t(a.batch) * a.positions * a.heads * a.head_dim, a.dtype);
  a.cache = layout.of(keys, values);
  a.q = q.data();
  c.describe("B=", a.batch, " T=", a.positions, " H=", a.heads, " J=", a.kv_heads, " D=", a.head_dim,
             " R=", a.rotary_dim, " ", name_of(a.dtype), " norm=", a.norm, " interleaved=", a.interleaved,
             " half_tables=", a.half_tables);
  c.repeat([&](int parts) { c.run(&Kernels::kv_fill, &a, parts); });
  int64_t written = 0;
  for (int64_t row = 0; row < int64_t(a.batch) * a.positions; ++row) {
    for (int64_t h = 0; h < a.heads; ++h)
      expect_head(c, a, head_of(a, row, h, false, a.q_norm), q, (row * a.heads + h) * a.head_dim);
    const int64_t slot = slots[row % a.positions];
    if (slot < 0 || slot >= a.slots) continue;
    for (int64_t j = 0; j < a.kv_heads; ++j) {
      const int64_t at = layout.at(row / a.positions, j, slot);
      expect_head(c, a, head_of(a, row, a.heads + j, false, a.k_norm), keys, at);
      expect_head(c, a, head_of(a, row, a.heads + a.kv_heads + j, true, nullptr), values, at);
      written += a.head_dim;
    }
  }
  for (Values* cache : {&keys, &values}) {
    int64_t numbers = 0;
    for (int64_t i = 0; i < layout.count; ++i) numbers += !std::isnan(cache->at(i));
    c.expect(numbers == written, "another place of the cache was written");
  }
}

}  // namespace

std::vector<Check> cache_checks() { return {{"kv_fill", {&Kernels::kv_fill}, 40, check_kv_fill}}; }

}  // namespace river::checks
