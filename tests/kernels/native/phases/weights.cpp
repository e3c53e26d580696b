#include "weights.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace river::checks {
namespace {

constexpr int kLineBytes = 64;

Weights pack_expert(Case& c, const GemmArgs& a, uint8_t* weight, uint16_t* scale_zero, bool used) {
  const int64_t n_all = a.epilogue.out_features, k_all = a.in_features, groups = a.groups(), size = a.group_size;
  Weights w{Doubles(n_all * k_all), Doubles(n_all * k_all)};
  for (int64_t n = 0; n < ceil_div(n_all, int64_t(kBlock)) * kBlock; ++n)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t at = n / kBlock * groups + group;
      uint16_t* const pair = scale_zero + (at * kBlock + n % kBlock) * 2;
      pair[0] = bfloat16_bits(used ? c.random.normal() * 0.1 : kNaN);
      pair[1] = bfloat16_bits(used ? c.random.normal() * 0.5 : kNaN);
      for (int64_t i = 0; i < size; ++i) {
        const int q = c.random.between(0, 15);
        const int64_t line = i / 8, j = i % 4;
        uint8_t& byte = weight[(at * (size / 8) + line) * kLineBytes + 4 * (n % kBlock) + j];
        byte = i % 8 < 4 ? uint8_t((byte & 0xf0) | q) : uint8_t((byte & 0x0f) | q << 4);
        const int64_t k = group * size + i;
        if (n >= n_all || k >= k_all) continue;
        w.steps[n * k_all + k] = (q - 8) * bfloat16_value(pair[0]);
        w.values[n * k_all + k] = bfloat16_value(pair[1]);
      }
    }
  return w;
}

// The 16 most frequent upper bytes of weights.
std::array<uint8_t, 16> palette_of(const std::vector<uint16_t>& weights) {
  std::array<int, 256> counts{}, order;
  for (const uint16_t w : weights) ++counts[w >> 8];
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return counts[a] > counts[b]; });
  std::array<uint8_t, 16> palette;
  std::copy_n(order.begin(), 16, palette.begin());
  return palette;
}

// Weights of which a share has rare exponents.
std::vector<uint16_t> draw_bfloat16(Case& c, int64_t count) {
  Random& r = c.random;
  const int rare = r.pick({0, 3, 40, 1000});  // one of so many, or none
  std::vector<uint16_t> weights(count);
  for (uint16_t& w : weights)
    w = bfloat16_bits(rare && r.one_in(rare) ? std::ldexp(r.normal(), r.between(-60, 4)) : r.normal() * 0.2);
  return weights;
}

// The byte of a line that holds input feature `i` of a unit.
int64_t byte_of_feature(int64_t i) { return i < 32 ? i / 8 * 16 + i % 8 : (i - 32) / 8 * 16 + 8 + i % 8; }

// Packs a matrix [N, K] in units of zeros; returns its palette, each four's first patch, and the patches.
std::vector<int32_t> pack_units(const std::vector<uint16_t>& weights, int64_t n_all, int64_t k_all, uint8_t* units) {
  const int64_t fours = ceil_div(n_all, int64_t(kBlock)) * kBlock / kFour, across = ceil_div(k_all, int64_t(kUnit));
  const std::array<uint8_t, 16> palette = palette_of(weights);
  std::vector<int32_t> side(4), patches;
  std::memcpy(side.data(), palette.data(), 16);
  side.push_back(0);
  for (int64_t four = 0; four < fours; ++four) {
    for (int64_t k = 0; k < k_all; ++k)
      for (int64_t n = four * kFour; n < std::min(n_all, (four + 1) * kFour); ++n) {
        const uint16_t w = weights[n * k_all + k];
        const int64_t of = n % kFour, code = std::find(palette.begin(), palette.end(), w >> 8) - palette.begin();
        auto* const unit = units + (four * across + k / kUnit) * kUnitBytes + byte_of_feature(k % kUnit);
        if (code == 16) {
          patches.push_back(int32_t(4 * k + of));
          patches.push_back(w);
        } else {
          unit[of / 2 * kUnit] |= uint8_t(code << (of % 2 ? 4 : 0));
          unit[(2 + of) * kUnit] = uint8_t(w);
        }
      }
    side.push_back(int32_t(patches.size() / 2));
  }
  side.insert(side.end(), patches.begin(), patches.end());
  return side;
}

}  // namespace

std::vector<Weights> pack_int4(Case& c, GemmArgs& a, const std::vector<bool>& used) {
  const int64_t experts = int64_t(used.size()), blocks = ceil_div(int64_t(a.epilogue.out_features), int64_t(kBlock));
  const int64_t bytes = blocks * a.padded_features() * kBlock / 2, pairs = blocks * a.groups() * kBlock * 2;
  auto* const weight = c.input_of(experts * bytes).data<uint8_t>();
  auto* const scale_zero = c.input_of(experts * pairs * 2).data<uint16_t>();
  std::vector<Weights> all;
  for (int64_t i = 0; i < experts; ++i)
    all.push_back(pack_expert(c, a, weight + i * bytes, scale_zero + i * pairs, used[i]));
  a.weight = weight;
  a.scale_zero = scale_zero;
  a.experts = int32_t(experts);
  return all;
}

std::vector<Weights> pack_dense_experts(Case& c, GemmArgs& a, const std::vector<bool>& used) {
  const int64_t experts = int64_t(used.size()), each = int64_t(a.epilogue.out_features) * a.in_features;
  Values& stack = c.input(experts * each, a.epilogue.dtype);
  std::vector<Weights> all(experts);
  for (int64_t i = 0; i < experts * each; ++i) {
    if (!used[i / each]) continue;
    stack.set(i, c.random.normal());
    all[i / each].values.push_back(stack.at(i));
  }
  a.dense = {{stack.data()}, {0, a.epilogue.out_features}, 1};
  a.experts = int32_t(experts);
  return all;
}

Weights pack_dense(Case& c, GemmArgs& a, const std::vector<int32_t>& first) {
  const int64_t k = a.in_features;
  Weights w;
  a.dense.count = int32_t(first.size()) - 1;
  for (int i = 0; i <= a.dense.count; ++i) a.dense.first[i] = first[i];
  for (int i = 0; i < a.dense.count; ++i) {
    const int64_t values = (first[i + 1] - first[i]) * k;
    Values& matrix = c.normal(1, values, values, a.epilogue.dtype);
    a.dense.data[i] = matrix.data();
    for (int64_t j = 0; j < values; ++j) w.values.push_back(matrix.at(j));
  }
  return w;
}

std::vector<Weights> pack_12_bits(Case& c, GemmArgs& a, const std::vector<bool>& used, Rows& dense) {
  const int64_t experts = int64_t(used.size()), n = a.epilogue.out_features, k = a.in_features;
  const int64_t bytes = ceil_div(n, int64_t(kBlock)) * kBlock / kFour * ceil_div(k, int64_t(kUnit)) * kUnitBytes;
  auto* const units = c.input_of(experts * bytes).data<uint8_t>();
  Values& plain = c.input(experts * n * k, kBFloat16);
  std::vector<Weights> all(experts);
  std::vector<std::vector<int32_t>> sides(experts);
  size_t longest = 0;
  for (int64_t i = 0; i < experts; ++i) {
    if (!used[i]) continue;
    const std::vector<uint16_t> weights = draw_bfloat16(c, n * k);
    std::fill_n(units + i * bytes, bytes, 0);
    sides[i] = pack_units(weights, n, k, units + i * bytes);
    longest = std::max(longest, sides[i].size());
    std::memcpy(plain.from(i * n * k), weights.data(), 2 * weights.size());
    for (const uint16_t x : weights) all[i].values.push_back(bfloat16_value(x));
  }
  auto* const side = c.input_of(4 * experts * int64_t(longest)).data<int32_t>();
  for (int64_t i = 0; i < experts; ++i) std::copy(sides[i].begin(), sides[i].end(), side + i * longest);
  a.weight = units;
  a.palette = side;
  a.side_each = int64_t(longest);
  a.experts = int32_t(experts);
  dense = {{plain.data()}, {0, int32_t(n)}, 1};
  return all;
}

std::vector<Weights> pack_mxfp4(Case& c, GemmArgs& a, const std::vector<bool>& used, Rows& dense) {
  constexpr double kMagnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const int64_t experts = int64_t(used.size()), each = int64_t(a.epilogue.out_features) * a.in_features;
  auto* const bytes = c.input_of(experts * each / 2).data<uint8_t>();
  auto* const exponents = c.input_of(experts * each / kMxGroup).data<uint8_t>();
  auto* const plain = static_cast<uint16_t*>(c.input(experts * each, kBFloat16).data());
  const int least = c.random.pick({40, 110, 120});
  std::vector<Weights> all(experts);
  for (int64_t i = 0; i < experts * each; ++i) {
    if (!used[i / each]) continue;
    if (i % kMxGroup == 0) exponents[i / kMxGroup] = uint8_t(least + c.random.between(0, 9));
    if (i % 2 == 0) bytes[i / 2] = c.random.byte();
    const int code = bytes[i / 2] >> i % 2 * 4 & 15;
    const double w = std::ldexp(kMagnitudes[code % 8], exponents[i / kMxGroup] - 127) * (code < 8 ? 1 : -1);
    plain[i] = bfloat16_bits(w);
    all[i / each].values.push_back(w);
  }
  a.weight = bytes;
  a.exponents = exponents;
  a.experts = int32_t(experts);
  dense = {{plain}, {0, a.epilogue.out_features}, 1};
  return all;
}

std::vector<Weights> pack_transposed(Case& c, GemmArgs& a, const std::vector<bool>& used, Rows& dense) {
  const std::vector<Weights> all = pack_dense_experts(c, a, used);
  dense = a.dense;
  const int64_t n_all = a.epilogue.out_features, each = n_all * a.in_features;
  Values& turned = c.input(int64_t(used.size()) * each, a.epilogue.dtype);
  for (int64_t i = 0; i < int64_t(used.size()) * each; ++i)
    if (used[i / each]) turned.set(i, all[i / each].values[i % n_all * a.in_features + i % each / n_all]);
  a.dense.data[0] = turned.data();
  a.transposed = 1;
  return all;
}

Weights pack_8_bits(Case& c, GemmArgs& a) {
  const int64_t n_all = a.epilogue.out_features, k_all = a.in_features, groups = a.grouped ? k_all / 32 : 1;
  const bool floats = a.in_8_bits == kFloat8s;
  Buffer& weight = c.input_of(n_all * k_all);
  Values& scale = c.input(n_all * groups, kFloat32);
  for (int64_t i = 0; i < n_all * groups; ++i) scale.set(i, c.random.uniform() * 0.01 + 1e-4);
  Weights w;
  for (int64_t i = 0; i < n_all * k_all; ++i) {
    uint8_t& byte = weight.data<uint8_t>()[i] = c.random.byte();
    if (floats && (byte & 127) == 127) byte ^= 1;  // (that is no number)
    const double factor = scale.at(i / k_all * groups + (a.grouped ? i % k_all / 32 : 0));
    w.values.push_back(value_of(&byte, 0, floats ? kFloat8s : kInt8s) * factor);
  }
  a.weight = weight.data<uint8_t>();
  a.scale = static_cast<const float*>(scale.data());
  return w;
}

}  // namespace river::checks
