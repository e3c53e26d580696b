// What lies around the matmuls of a mixture of experts: the choice, its order, and the weighted sum.
#include <algorithm>
#include <numeric>

#include "activations.h"

namespace river::checks {
namespace {

// Memory of an output of integers, which `repeat` compares. (Integers lie at multiples of their size.)
template <class T>
T* output_of(Case& c, int64_t count) {
  return c.output(count * int64_t(sizeof(T)) / 4, kFloat32).data<T>();
}

// Places are a permutation: experts ascend in it, equal ones keep the order of their rows, and those of none come last.
void check_sort(Case& c) {
  Random& r = c.random;
  SortArgs a{};
  a.rows = r.one_in(4) ? 1 : r.between(2, 200);
  a.experts = r.one_in(3) ? 1 : r.between(2, 130);
  auto* const chosen = c.input_of(8 * a.rows).data<int64_t>();
  const bool wrong = r.one_in(2);
  for (int row = 0; row < a.rows; ++row)
    chosen[row] = wrong && r.one_in(6) ? r.pick<int64_t>({-1, a.experts, int64_t(1) << 40, -(int64_t(1) << 40)})
                                       : r.between(0, a.experts - 1);
  a.chosen = chosen;
  a.expert = output_of<int64_t>(c, a.rows);
  a.order = output_of<int32_t>(c, a.rows);
  a.place = output_of<int32_t>(c, a.rows);
  a.starts = c.workspace(4 * (a.experts + 2)).data<int32_t>();
  c.describe("R=", a.rows, " experts=", a.experts, " wrong=", wrong);
  c.repeat([&](int) { c.run(&Kernels::sort, &a, 1); });
  const auto bin_of = [&](int64_t expert) { return expert < 0 || expert >= a.experts ? a.experts : expert; };
  std::vector<int32_t> order(a.rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return bin_of(chosen[i]) < bin_of(chosen[j]); });
  for (int at = 0; at < a.rows; ++at) {
    const int64_t expert = chosen[order[at]];
    c.expect(a.order[at] == order[at], "a place has another row");
    c.expect(a.place[order[at]] == at, "a row has another place");
    c.expect(a.expert[at] == (bin_of(expert) == a.experts ? -1 : expert), "a place has another expert");
  }
}

void check_combine(Case& c) {
  Random& r = c.random;
  CombineArgs a{};
  a.rows = r.between(1, 9);
  a.each = r.between(1, 8);
  a.features = r.one_in(3) ? 128 * r.between(1, 4) : r.between(1, 400);
  a.dtype = r.dtype();
  a.weight_dtype = r.dtype();
  const int64_t n = a.features, all = int64_t(a.rows) * a.each, stride = n + r.pick({0, 5});
  Values &values = c.normal(all, n, n, a.dtype), &weight = c.normal(1, all, 0, a.weight_dtype);
  auto* const place = c.input_of(4 * all).data<int32_t>();
  std::iota(place, place + all, 0);
  for (int64_t i = all - 1; i > 0; --i) std::swap(place[i], place[r.between(0, int(i))]);
  a.values = values.data();
  a.weight = weight.data();
  a.place = place;
  if (r.one_in(2)) a.residual = {c.normal(a.rows, n, stride, a.dtype).data(), stride};
  Values& y = c.output(a.rows * n, a.dtype);
  a.y = y.data();
  c.describe("M=", a.rows, " each=", a.each, " N=", n, " ", name_of(a.dtype), " weights ", name_of(a.weight_dtype),
             " residual=", a.residual.data ? 1 : 0);
  c.repeat([&](int parts) { c.run(&Kernels::combine_experts, &a, parts); });
  for (int64_t i = 0; i < a.rows * n; ++i) {
    const int64_t row = i / n;
    double sum = a.residual.data ? value_of(a.residual.data, row * stride + i % n, a.dtype) : 0;
    double magnitude = std::fabs(sum);
    for (int64_t j = row * a.each; j < (row + 1) * a.each; ++j) {
      const double product = weight.at(j) * values.at(place[j] * n + i % n);
      sum += product;
      magnitude += std::fabs(product);
    }
    const double allowed = kSumError * magnitude + rounding_of(a.dtype) * std::fabs(sum) + tiny_of(a.dtype);
    c.expect_near("y", i, y.at(i), sum, allowed);
  }
}

// The numbers of a row's logits, descending, the first of equal ones first and NaN above all.
std::vector<int64_t> descending(const double* z, int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto is_above = [](double a, double b) { return a > b || (std::isnan(a) && !std::isnan(b)); };
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return is_above(z[i], z[j]); });
  return order;
}

void check_weights(Case& c, const RouteArgs& a, const double* z, const int64_t* chosen, int64_t row) {
  double all = 0, some = 0;
  for (int64_t i = 0; i < a.experts; ++i) all += std::exp(z[i] - z[chosen[0]]);
  for (int64_t j = 0; j < a.each; ++j) some += std::exp(z[chosen[j]] - z[chosen[0]]);
  for (int64_t j = 0; j < a.each; ++j) {
    const double weight = std::exp(z[chosen[j]] - z[chosen[0]]) / (a.routing == kAmongAll ? all : some);
    const double found = value_of(a.weight, row * a.each + j, a.weight_dtype);
    const double allowed = (kSumError + rounding_of(a.weight_dtype)) * weight + tiny_of(a.weight_dtype);
    if (std::isnan(weight))
      c.expect(std::isnan(found), "the weight of NaN is a number");
    else
      c.expect_near("weight", row * a.each + j, found, weight, allowed);
  }
}

void check_route(Case& c) {
  Random& r = c.random;
  RouteArgs a{};
  a.rows = r.between(1, 9);
  a.experts = r.one_in(8) ? kMostExperts : r.between(1, 160);
  a.each = r.between(1, std::min(a.experts, 8));
  a.dtype = r.dtype();
  a.weight_dtype = r.one_in(2) ? int32_t(kFloat32) : a.dtype;
  a.routing = r.between(kAmongAll, kAmongChosen);
  const int64_t n = a.experts, stride = n + r.pick({0, 3});
  Values& logits = c.normal(a.rows, n, stride, a.dtype, r.pick({0.5, 3.0, 20.0}));
  for (int64_t row = 0; row < a.rows; ++row) {
    const int kind = r.between(0, 5);  // equal ones, a NaN, or experts that nothing chooses
    for (int64_t i = 0; kind < 3 && i < n; ++i)
      if (r.one_in(3) && (kind != 2 || i > 0))
        logits.set(row * stride + i, kind == 0 ? 2 : kind == 1 ? kNaN : -kInfinity);
  }
  a.logits = {logits.data(), stride};
  a.index = output_of<int64_t>(c, int64_t(a.rows) * a.each);
  a.weight = c.output(int64_t(a.rows) * a.each, a.weight_dtype).data();
  c.describe("M=", a.rows, " experts=", n, " each=", a.each, " ", name_of(a.dtype), " weights ",
             name_of(a.weight_dtype), " routing=", a.routing);
  c.repeat([&](int parts) { c.run(&Kernels::route, &a, parts); });
  const Doubles z = doubles_of(a.logits, a.rows, n, a.dtype);
  for (int64_t row = 0; row < a.rows; ++row) {
    const std::vector<int64_t> order = descending(&z[row * n], n);
    const bool same = std::equal(order.begin(), order.begin() + a.each, a.index + row * a.each);
    c.expect(same, "other experts were chosen, or in another order");
    check_weights(c, a, &z[row * n], order.data(), row);
  }
}

}  // namespace

std::vector<Check> experts_checks() {
  return {
      {"sort", {&Kernels::sort}, 30, check_sort},
      {"combine_experts", {&Kernels::combine_experts}, 36, check_combine},
      {"route", {&Kernels::route}, 48, check_route},
  };
}

}  // namespace river::checks
