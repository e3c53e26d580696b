#include "epilogue.h"

#include <algorithm>

namespace river::checks {
namespace {

double activated(int32_t activation, double x) {
  switch (activation) {
    case kSilu: return x / (1 + std::exp(-x));
    case kGelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case kGeluTanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case kRelu: return std::max(x, 0.0);
    case kClampedSwish: return std::min(x, 7.0) / (1 + std::exp(-1.702 * std::min(x, 7.0)));
    default: return x;
  }
}

constexpr double kSteepest = 1.2;  // more than the slope of any of these

double bias_of(const Epilogue& e, int64_t n) {
  for (int i = 0; i < e.bias.count; ++i)
    if (n < e.bias.first[i + 1]) return value_of(e.bias.data[i], n - e.bias.first[i], e.dtype);
  return 0;
}

}  // namespace

std::vector<int32_t> draw_matrices(Case& c, int out_features) {
  std::vector<int32_t> first{0, out_features};
  for (int more = c.random.between(0, kMatrices - 1); more > 0; --more)
    if (const int at = c.random.between(0, out_features); std::count(first.begin(), first.end(), at) == 0)
      first.push_back(at);
  std::sort(first.begin(), first.end());
  return first;
}

void draw_epilogue(Case& c, Epilogue& e, int rows, const std::vector<int32_t>& first, const Around& may) {
  Random& r = c.random;
  const bool gated = may.gate && e.out_features % 32 == 0 && r.one_in(2);
  e.gated = !gated ? kNoGate : may.pairs && r.one_in(2) ? kGatePairs : kGateFirst;
  e.activation = gated || r.one_in(2) ? r.between(kIdentity, kClampedSwish) : kIdentity;
  const int64_t width = e.width(), stride = width + r.pick({0, 3}), other = width + r.pick({0, 7});
  if (may.bias && r.one_in(2)) {
    e.bias.count = int32_t(first.size()) - 1;
    for (int i = 0; i <= e.bias.count; ++i) e.bias.first[i] = first[i];
    for (int i = 0; i < e.bias.count; ++i) e.bias.data[i] = c.normal(1, first[i + 1] - first[i], 0, e.dtype).data();
  }
  if (may.residual && r.one_in(2)) e.residual = {c.normal(rows, width, other, e.dtype).data(), other};
  e.y = {c.output((rows - 1) * stride + width, e.dtype).data(), stride};
  c.describe(" ", name_of(e.dtype), " activation=", e.activation, " gated=", e.gated, " biases=", e.bias.count);
}

void expect_epilogue(Case& c, const Epilogue& e, int rows, const Sums& sums) {
  const int64_t width = e.width(), all = e.out_features;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < width; ++n) {
      const int64_t at = e.gated == kGatePairs ? 2 * n : n, partner = e.gated == kGatePairs ? at + 1 : n + width;
      const auto sum_of = [&](int64_t of) { return sums.values[row * all + of] + bias_of(e, of); };
      const auto magnitude_of = [&](int64_t of) { return sums.magnitudes[row * all + of] + std::fabs(bias_of(e, of)); };
      const double x = sum_of(at), off = magnitude_of(at);
      double y = activated(e.activation, x), magnitude = (e.activation ? kSteepest : 1) * off;
      if (e.gated) {
        const bool clamped = e.activation == kClampedSwish;
        const double up = clamped ? 1 + std::clamp(sum_of(partner), -7.0, 7.0) : sum_of(partner);
        magnitude = magnitude * std::fabs(up) + std::fabs(y) * (clamped + magnitude_of(partner));
        y *= up;
      }
      if (e.residual.data) {
        const double added = value_of(e.residual.data, row * e.residual.stride + n, e.dtype);
        y += added;
        magnitude += std::fabs(added);
      }
      const double allowed = kSumError * magnitude + rounding_of(e.dtype) * std::fabs(y) + tiny_of(e.dtype);
      c.expect_near("y", row * e.y.stride + n, value_of(e.y.data, row * e.y.stride + n, e.dtype), y, allowed);
    }
  for (int64_t i = 0; i < (rows - 1) * e.y.stride; ++i)
    if (i % e.y.stride >= width) c.expect(std::isnan(value_of(e.y.data, i, e.dtype)), "y was written between its rows");
}

}  // namespace river::checks
