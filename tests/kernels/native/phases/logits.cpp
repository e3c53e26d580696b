// Logits: the largest computed again, what they choose, and the exit score of hidden states.
#include <algorithm>

#include "activations.h"

namespace river::checks {
namespace {

constexpr int kBlocksAgain = 256, kBlocksOfSome = 16;  // whose maxima are computed again: of all logits, or of some

struct Head {
  RescoreArgs a{};
  Doubles logits, x, weight;  // [M, N], [M, K], [N, K]
};

// The least logit of a row that is computed again.
double least_of(const double* logits, int64_t count) {
  Doubles largest;
  const int64_t blocks = ceil_div(count, int64_t(kBlockOfLogits));
  for (int64_t first = 0; first < count; first += kBlockOfLogits) {
    double most = -kInfinity;
    for (int64_t i = first; i < std::min(first + kBlockOfLogits, count); ++i)
      if (logits[i] > most) most = logits[i];
    if (most > kMaskedLogit) largest.push_back(most);
  }
  const bool all = int64_t(largest.size()) == blocks;
  const size_t again = all ? kBlocksAgain : kBlocksOfSome;
  if (largest.size() <= again) return all ? -kInfinity : std::nextafter(kMaskedLogit, 0.0f);
  std::sort(largest.rbegin(), largest.rend());
  return largest[again - 1];
}

Head draw_head(Case& c, bool some) {
  Random& r = c.random;
  Head h;
  RescoreArgs& a = h.a;
  const int rows = a.rows = r.between(1, 3);
  a.dtype = r.dtype();
  a.in_features = r.between(1, some ? 300 : 40);
  a.padded_features = int32_t(padded_of(a.in_features, kLargestGroup));
  a.out_features = some ? r.between(1, 2000) : r.between(260 * kBlockOfLogits, 270 * kBlockOfLogits);
  const int64_t n = a.out_features, k = a.in_features, stride = n + r.pick({0, 3});
  a.logits = {c.normal(rows, n, stride, a.dtype).data(), stride};
  for (int64_t row = 0; some && row < rows; ++row)
    for (int64_t i = 0; i < n; ++i)
      if (i / kBlock % 5 != row) set_value(a.logits.data, row * stride + i, a.dtype, kMaskedLogit);
  if (!some) set_value(a.logits.data, r.between(0, int(n) - 1), a.dtype, kNaN);
  h.logits = doubles_of(a.logits, rows, n, a.dtype);
  Values& x = c.normal(rows, k, a.padded_features, kFloat32);
  Buffer& padded = c.input_of(rows * int64_t(a.padded_features) * 4);  // the padding is zero
  std::fill_n(padded.data<float>(), rows * a.padded_features, 0.0f);
  for (int64_t i = 0; i < rows * k; ++i) {
    h.x.push_back(x.at(i / k * a.padded_features + i % k));
    padded.data<float>()[i / k * a.padded_features + i % k] = float(h.x.back());
  }
  a.x = {padded.data(), nullptr, nullptr, nullptr, kFloats};
  Values& weight = c.normal(1, n * k, 0, a.dtype);
  for (int64_t i = 0; i < n * k; ++i) h.weight.push_back(weight.at(i));
  a.weight = weight.data();
  if (r.one_in(2)) a.bias = c.normal(1, n, 0, a.dtype).data();
  a.y = c.output(rows * n, a.dtype).data();
  c.describe("M=", rows, " N=", n, " K=", k, " ", name_of(a.dtype));
  return h;
}

void check_rescore(Case& c, bool some) {
  Head h = draw_head(c, some);
  RescoreArgs& a = h.a;
  const int64_t n = a.out_features, k = a.in_features, rows = int64_t(h.logits.size()) / n;
  Buffer& largest = c.workspace(3 * 2 * ceil_div(n, int64_t(kBlockOfLogits)) * 4);
  a.largest = largest.data<float>();
  c.repeat([&](int parts) {
    a.ways = parts;
    c.run(&Kernels::rescore, &a, parts);
  });
  for (int64_t row = 0; row < rows; ++row) {
    const double least = least_of(&h.logits[row * n], n);
    for (int64_t i = row * n; i < (row + 1) * n; ++i) {
      const double found = value_of(a.y, i, a.dtype);
      if (!(h.logits[i] >= least)) {
        c.expect(found == h.logits[i] || std::isnan(h.logits[i]) == std::isnan(found), "another logit was changed");
        continue;
      }
      double y = a.bias ? value_of(a.bias, i % n, a.dtype) : 0, magnitude = std::fabs(y);
      for (int64_t j = 0; j < k; ++j) {
        const double product = h.x[row * k + j] * h.weight[i % n * k + j];
        y += product;
        magnitude += std::fabs(product);
      }
      const double allowed = kSumError * magnitude + rounding_of(a.dtype) * std::fabs(y) + tiny_of(a.dtype);
      c.expect_near("logit", i, found, y, allowed);
    }
  }
}

void check_exit_score(Case& c) {
  Random& r = c.random;
  ScoreArgs a{};
  a.rows = r.between(1, 5);
  a.features = r.between(1, 700);
  a.dtype = r.dtype();
  const int64_t k = a.features, stride = k + r.pick({0, 5}), other = k + r.pick({0, 2});
  a.hidden = {c.normal(a.rows, k, stride, a.dtype).data(), stride};
  a.previous = {c.normal(a.rows, k, other, a.dtype).data(), other};
  const double nearness = r.uniform();
  for (int64_t i = 0; i < a.rows * k; ++i) {
    const int64_t row = i / k, at = row * other + i % k;
    const double near = value_of(a.hidden.data, row * stride + i % k, a.dtype),
                 far = value_of(a.previous.data, at, a.dtype);
    set_value(a.previous.data, at, a.dtype, nearness * near + (1 - nearness) * far);
  }
  const int wrong = r.between(0, 5);  // 0: a row of zeros, 1: what is not finite
  const int64_t spoiled = r.between(0, a.rows - 1) * stride;
  for (int64_t i = 0; wrong == 0 && i < k; ++i) set_value(a.hidden.data, spoiled + i, a.dtype, 0);
  if (wrong == 1) set_value(a.hidden.data, spoiled + k - 1, a.dtype, r.pick({kNaN, kInfinity}));
  Values& score = c.output(1, kFloat32);
  a.score = score.data<float>();
  c.describe("M=", a.rows, " K=", k, " ", name_of(a.dtype), " spoiled=", wrong < 2);
  c.repeat([&](int) { c.run(&Kernels::exit_score, &a, 1); });
  const Doubles x = doubles_of(a.hidden, a.rows, k, a.dtype), y = doubles_of(a.previous, a.rows, k, a.dtype);
  double least = kInfinity;
  for (int64_t row = 0; row < a.rows; ++row) {
    double xy = 0, xx = 0, yy = 0;
    for (int64_t i = row * k; i < (row + 1) * k; ++i) xy += x[i] * y[i], xx += x[i] * x[i], yy += y[i] * y[i];
    least = std::min(least, xy / std::sqrt(xx * yy));
  }
  if (wrong < 2) return c.expect(std::isnan(score.at(0)), "the score of a spoiled row is a number");
  c.expect_near("score", 0, score.at(0), least, kSumError);
}

// A row's first largest logit, NaN above all, and its entropy in nats.
struct Choice {
  int64_t number = 0;
  double entropy = 0;
};

Choice choice_of(const double* z, int64_t count) {
  Choice choice;
  for (int64_t i = 1; i < count; ++i)
    if (z[i] > z[choice.number] || (std::isnan(z[i]) && !std::isnan(z[choice.number]))) choice.number = i;
  double total = 0, spread = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double lower = z[i] - z[choice.number];
    if (lower == -kInfinity) continue;
    total += std::exp(lower);
    spread += lower * std::exp(lower);
  }
  choice.entropy = std::log(total) - spread / total;
  return choice;
}

ChoiceArgs draw_choices(Case& c) {
  Random& r = c.random;
  ChoiceArgs a{};
  a.rows = r.between(1, 4);
  a.logits_each = r.one_in(3) ? r.between(1, 100) : r.between(101, 3 * kLogitsTogether);
  a.chunks = ceil_div(a.logits_each, kLogitsTogether);
  a.dtype = r.dtype();
  a.only_largest = r.one_in(4);
  const int64_t n = a.logits_each;
  a.stride = n + r.pick({0, 7});
  Values& logits = c.normal(a.rows, n, a.stride, a.dtype, r.pick({0.5, 3.0, 30.0}));
  for (int64_t row = 0; row < a.rows; ++row) {
    const int kind = r.between(0, 5), first = r.between(0, int(n) - 1), second = r.between(0, int(n) - 1);
    for (int64_t i = 0; kind < 2 && i < n; ++i)  // a grammar permits some
      if (i != first && (i / kLogitsTogether == 0 || r.one_in(2)))
        logits.set(row * a.stride + i, kind == 0 ? -kInfinity : double(kMaskedLogit));
    for (const int i : {first, second})
      if (kind == 2 || kind == 3) logits.set(row * a.stride + i, kind == 2 ? kNaN : 200);  // (equals)
  }
  a.logits = logits.data();
  c.describe("M=", a.rows, " V=", n, " ", name_of(a.dtype), " only_largest=", a.only_largest);
  return a;
}

void check_choices(Case& c) {
  ChoiceArgs a = draw_choices(c);
  a.weighed = c.workspace(int64_t(a.rows) * a.chunks * 12).data();
  Buffer& choices = c.output(4 * a.rows, kFloat32);  // two doubles for each row
  Values& score = c.output(1, kFloat32);
  const bool with_choices = !c.random.one_in(4);
  // (Doubles lie at multiples of 8.)
  auto* const aligned = reinterpret_cast<double*>(c.workspace(16 * a.rows).data());
  a.choices = with_choices ? aligned : nullptr;
  a.score = c.random.one_in(2) || !with_choices ? score.data<float>() : nullptr;
  c.repeat([&](int parts) {
    c.run(&Kernels::weigh, &a, parts);
    c.run(&Kernels::choose, &a, 1);
    std::memcpy(choices.data(), aligned, 16 * a.rows);
  });
  const Doubles z = doubles_of({const_cast<void*>(a.logits), a.stride}, a.rows, a.logits_each, a.dtype);
  const auto is_near = [&](const char* what, int64_t row, double found, double expected) {
    if (std::isnan(expected)) return c.expect(std::isnan(found), "the entropy of NaN is a number");
    c.expect_near(what, row, found, expected, 5 * kSumError * (1 + std::fabs(expected)));
  };
  double most = -kInfinity;
  for (int64_t row = 0; row < a.rows; ++row) {
    Choice choice = choice_of(&z[row * a.logits_each], a.logits_each);
    if (a.only_largest) choice.entropy = 0;
    most = choice.entropy > most || std::isnan(choice.entropy) ? choice.entropy : most;
    if (!with_choices) continue;
    c.expect_near("choice", row, aligned[2 * row], double(choice.number), 0);
    is_near("entropy", row, aligned[2 * row + 1], choice.entropy);
  }
  if (a.score) is_near("score", 0, score.at(0), most);
}

}  // namespace

std::vector<Check> logits_checks() {
  return {
      {"rescore", {&Kernels::rescore}, 6, [](Case& c) { check_rescore(c, false); }},
      {"rescore, some", {&Kernels::rescore}, 16, [](Case& c) { check_rescore(c, true); }},
      {"exit_score", {&Kernels::exit_score}, 24, check_exit_score},
      {"weigh and choose", {&Kernels::weigh, &Kernels::choose}, 36, check_choices},
  };
}

}  // namespace river::checks
