// Prepared activations: norms, formats, padding and residuals.
#include "activations.h"

namespace river::checks {
namespace {

struct Expected {
  Doubles values, magnitudes;  // [M, K]
};

// The rows of x in the order that was asked for.
Doubles rows_of(const PrepareArgs& a) {
  const int64_t k = a.in_features;
  Doubles rows;
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t from = a.order ? a.order[row] / a.each : row;
    for (int64_t i = 0; i < k; ++i) rows.push_back(value_of(a.x.data, from * a.x.stride + i, a.dtype));
  }
  return rows;
}

Expected expected_of(const PrepareArgs& a) {
  const int64_t k = a.in_features;
  Expected e{rows_of(a), {}};
  e.magnitudes.resize(e.values.size());
  for (int64_t row = 0; row < a.rows; ++row) {
    double* const x = e.values.data() + row * k;
    double shift = 0, squares = 0;
    for (int64_t i = 0; a.norm == kLayerNorm && i < k; ++i) shift += x[i] / double(k);
    for (int64_t i = 0; i < k; ++i) squares += (x[i] - shift) * (x[i] - shift);
    const double factor = a.norm ? 1 / std::sqrt(squares / double(k) + a.eps) : 1;
    for (int64_t i = 0; i < k; ++i) {
      const double plus = a.norm == kRmsPlusOne ? 1 : 0;
      const double weight = a.norm ? value_of(a.norm_weight, i, a.dtype) + plus : 1;
      const double bias = a.norm_bias ? value_of(a.norm_bias, i, a.dtype) : 0;
      const double added = a.residual.data ? value_of(a.residual.data, row * a.residual.stride + i, a.dtype) : 0;
      e.magnitudes[row * k + i] =
          (std::fabs(x[i]) + std::fabs(shift)) * factor * std::fabs(weight) + std::fabs(bias) + std::fabs(added);
      x[i] = (x[i] - shift) * factor * weight + bias + added;
    }
  }
  return e;
}

// Calls f(row, k, expected value, what a float32 result may be off), padding included.
template <class F>
void each_value(const PrepareArgs& a, const Expected& e, const F& f) {
  const int64_t padded = padded_of(a.in_features, a.group_size);
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t k = 0; k < padded; ++k) {
      const int64_t i = row * a.in_features + k;
      const bool there = k < a.in_features;
      f(row, k, there ? e.values[i] : 0.0, there ? kSumError * e.magnitudes[i] : 0.0);
    }
}

void check_int8(Case& c, const PrepareArgs& a, const Expected& e) {
  const int64_t size = a.group_size, groups = ceil_div(a.in_features, a.group_size);
  const auto* values = static_cast<const int8_t*>(a.out.values);
  Doubles largest(a.rows * groups), sum(largest), magnitude(largest), off(largest);
  std::vector<int64_t> total(largest.size());
  each_value(a, e, [&](int64_t row, int64_t k, double expected, double allowed) {
    const int64_t i = row * groups + k / size;
    const int q = values[i * size + k % size];
    c.expect_near("value", i * size + k % size, q * double(a.out.scale[i]), expected, a.out.scale[i] * 0.501 + allowed);
    largest[i] = std::max(largest[i], std::fabs(expected));
    off[i] = std::max(off[i], allowed);
    sum[i] += expected;
    magnitude[i] += std::fabs(expected) * kSumError + allowed;
    total[i] += q;
  });
  for (size_t i = 0; i < largest.size(); ++i) {
    c.expect_near("scale", i, a.out.scale[i], largest[i] / 127, largest[i] * 1e-7 + off[i] / 127);
    c.expect_near("sum", i, a.out.sum[i], sum[i], magnitude[i]);
    c.expect(a.out.start[i] == -8 * total[i], "start is not minus 8 times the sum of the int8 values");
  }
}

// Where a format keeps the value of a row's feature `k`; `lanes`: of the vectors of kEvenOdd.
int64_t place_of(const PrepareArgs& a, int64_t row, int64_t k, int lanes) {
  const int64_t padded = padded_of(a.in_features, a.group_size);
  if (a.out.format == kAmxTiles && a.rows <= kBlock) return (k / 2 * a.rows + row) * 2 + k % 2;
  if (a.out.format == kAmxTiles) return row / kBlock * kBlock * padded + (k / 2 * kBlock + row % kBlock) * 2 + k % 2;
  if (a.out.format != kEvenOdd) return row * padded + k;
  return row * padded + k / (2 * lanes) * 2 * lanes + k % 2 * lanes + k % (2 * lanes) / 2;
}

// How many lanes the vectors of kEvenOdd have here, 0 if there is no such number.
int lanes_of(const PrepareArgs& a, const Expected& e) {
  for (const int lanes : {4, 8, 16}) {
    bool fits = true;
    each_value(a, e, [&](int64_t row, int64_t k, double expected, double allowed) {
      const double found = value_of(a.out.values, place_of(a, row, k, lanes), kFloat32);
      fits &= std::fabs(found - expected) <= allowed;
    });
    if (fits) return lanes;
  }
  return 0;
}

void check_format(Case& c, const PrepareArgs& a) {
  const Expected e = expected_of(a);
  if (a.out.format == kInt8) return check_int8(c, a, e);
  c.expect(a.out.format <= kUnchanged, "this check knows no such format of activations");
  const bool half = a.out.format == kBFloat16Rows || a.out.format == kAmxTiles, unchanged = a.out.format == kUnchanged;
  const int32_t dtype = unchanged ? a.dtype : half ? kBFloat16 : kFloat32;
  const int lanes = a.out.format == kEvenOdd ? lanes_of(a, e) : 1;
  c.expect(lanes > 0, "the values are not even and odd features in turn");
  if (!lanes) return;
  each_value(a, e, [&](int64_t row, int64_t k, double expected, double allowed) {
    if (unchanged && k >= a.in_features) return;
    const int64_t at = unchanged ? row * a.in_features + k : place_of(a, row, k, lanes);
    const double off = allowed + rounding_of(dtype) * std::fabs(expected) + (expected != 0 ? tiny_of(dtype) : 0);
    c.expect_near("value", at, value_of(a.out.values, at, dtype), expected, off);
  });
}

PrepareArgs drawn(Case& c, int32_t format) {
  Random& r = c.random;
  PrepareArgs a{};
  a.rows = r.one_in(4) ? 1 : r.between(2, 35);
  a.in_features = r.between(1, 400);
  a.group_size = format == kInt8 ? r.pick({32, 64, 128}) : kLargestGroup;
  a.dtype = r.dtype();
  a.norm = r.between(kNoNorm, kLayerNorm);
  a.eps = float(r.pick({1e-6, 1e-5, 0.1}));
  const int64_t k = a.in_features, stride = k + r.pick({0, 5});
  a.x = {c.normal(a.rows, k, stride, a.dtype, r.pick({0.01, 1.0, 30.0})).data(), stride};
  if (a.norm) a.norm_weight = c.normal(1, k, k, a.dtype).data();
  if (a.norm == kLayerNorm || (a.norm && r.one_in(3))) a.norm_bias = c.normal(1, k, k, a.dtype).data();
  return a;
}

void check_prepare(Case& c, int32_t format) {
  Random& r = c.random;
  PrepareArgs a = drawn(c, format);
  const int64_t k = a.in_features, stride = k + r.pick({0, 3});
  if (format == kUnchanged && r.one_in(2)) a.residual = {c.normal(a.rows, k, stride, a.dtype).data(), stride};
  if (r.one_in(6))  // a row of zeros
    for (int64_t i = 0; i < k; ++i) set_value(a.x.data, i, a.dtype, 0);
  c.describe("M=", a.rows, " K=", k, " group=", a.group_size, " ", name_of(a.dtype), " norm=", a.norm);
  if (format == kUnchanged)
    a.out = {c.output(a.rows * k, a.dtype).data(), nullptr, nullptr, nullptr, format};
  else
    a.out = activations_of(c, a.rows, k, a.group_size, format);
  c.repeat([&](int parts) { c.run(&Kernels::prepare, &a, parts); });
  check_format(c, a);
}

// Each row several times, in any order.
void check_order(Case& c, int32_t format) {
  Random& r = c.random;
  PrepareArgs a = drawn(c, format);
  const int tokens = a.rows;
  a.each = r.between(1, 3);
  a.rows = r.between(1, tokens * a.each);
  auto* const order = c.input_of(4 * a.rows).data<int32_t>();
  for (int row = 0; row < a.rows; ++row) order[row] = r.between(0, tokens * a.each - 1);
  a.order = order;
  c.describe("tokens=", tokens, " each=", a.each, " M=", a.rows, " K=", a.in_features, " ", name_of(a.dtype));
  a.out = activations_of(c, a.rows, a.in_features, a.group_size, format);
  c.repeat([&](int parts) { c.run(&Kernels::prepare, &a, parts); });
  check_format(c, a);
}

// What is not finite shows in the scale of its group, and in no other one.
void check_not_finite(Case& c) {
  PrepareArgs a = drawn(c, kInt8);
  a.norm = kNoNorm;
  const int64_t groups = ceil_div(a.in_features, a.group_size);
  const int64_t row = c.random.between(0, a.rows - 1), k = c.random.between(0, a.in_features - 1);
  set_value(a.x.data, row * a.x.stride + k, a.dtype, c.random.pick({kNaN, kInfinity, -kInfinity}));
  c.describe("M=", a.rows, " K=", a.in_features, " group=", a.group_size, " ", name_of(a.dtype));
  a.out = activations_of(c, a.rows, a.in_features, a.group_size, kInt8);
  c.repeat([&](int parts) { c.run(&Kernels::prepare, &a, parts); });
  for (int64_t i = 0; i < a.rows * groups; ++i)
    c.expect(std::isfinite(a.out.scale[i]) == (i != row * groups + k / a.group_size), "a scale hides an input");
}

}  // namespace

std::vector<Check> prepare_checks() {
  const auto of = [](int32_t format) { return [format](Case& c) { check_prepare(c, format); }; };
  const std::vector<Entry> entries{&Kernels::prepare};
  return {
      {"prepare int8", entries, 40, of(kInt8)},
      {"prepare int8, not finite", entries, 6, check_not_finite},
      {"prepare floats", entries, 12, of(kFloats)},
      {"prepare for bfloat16", entries, 16, [](Case& c) { check_prepare(c, c.kernels.bfloat16); }},
      {"prepare int8, in order", entries, 16, [](Case& c) { check_order(c, kInt8); }},
      {"prepare floats, in order", entries, 8, [](Case& c) { check_order(c, kFloats); }},
      {"prepare rows, in order", entries, 12, [](Case& c) { check_order(c, c.kernels.rows_of_bfloat16); }},
      {"prepare unchanged", entries, 16, of(kUnchanged)},
  };
}

}  // namespace river::checks
