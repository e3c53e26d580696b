// Operators for products with weights in 4 bits, or in the activations' dtype: from tensors to phases.
#pragma once

#include "bindings_kernels.h"
#include "tensors.h"

namespace river {

// Both phases of one product.
struct LinearCall {
  PrepareArgs prepare{};
  LinearArgs linear{};

  size_t groups_of_rows() const {
    return size_t(linear.rows) * ((linear.in_features + linear.group_size - 1) / linear.group_size);
  }
  size_t element_size() const {
    return linear.x.format == kInt8 ? 1 : linear.x.format == kTiled || linear.x.format == kPairs ? 2 : 4;
  }

  // In one of torch's parallel loops, or one for each phase where the call lies between calls of a library.
  void run(bool beside_library = false) {
    if (linear.rows == 0) return;
    place();
    kernels();  // (throws here where there are none: a phase must not)
    const int64_t values = int64_t(groups_of_rows()) * linear.group_size;
    const int64_t weights = (linear.out_features + kBlock - 1) / kBlock * (values / linear.rows) * kBlock;
    const int most = threads();
    const int rows = prepare.norm ? linear.rows : 4 * most;
    const int parts = std::min(rows, parts_of(values, 1 << 14, most));
    const int parts_of_weights = parts_of(weights * ((linear.rows + 3) / 4), 1 << 17, most);
    if (beside_library) {
      check(!Tape::recording(), "a product of many rows", "not be recorded");
      run_beside_library(&run_prepare, this, parts);
      run_beside_library(&run_linear, this, parts_of_weights);
      return;
    }
    const Call<LinearCall> call(*this);
    call.run({{&run_prepare, parts}, {&run_linear, parts_of_weights}}, most);
  }

  // More rows than one tile has.
  bool many() const { return linear.rows > kBlock; }

 private:
  // Finds room for the prepared activations.
  void place() {
    const auto aligned = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
    const size_t groups = groups_of_rows();
    const size_t spare = linear.x.format == kTiled && many() ? kBlock - 1 : 0;  // of the last block of rows
    const size_t values = aligned((groups + spare * groups / linear.rows) * linear.group_size * element_size());
    char* memory = workspace(values + 3 * aligned(groups * 4));
    Activations& x = linear.x;
    x.values = memory;
    x.scale = reinterpret_cast<float*>(memory += values);
    x.sum = reinterpret_cast<float*>(memory += aligned(groups * 4));
    x.start = reinterpret_cast<int32_t*>(memory + aligned(groups * 4));
    prepare.out = x;
  }

  static void run_prepare(const void* call, int part, int parts) {
    kernels().prepare(&static_cast<const LinearCall*>(call)->prepare, part, parts);
  }
  static void run_linear(const void* call, int part, int parts) {
    kernels().linear(&static_cast<const LinearCall*>(call)->linear, part, parts);
  }
};

inline void check_weight(const Tensor& weight, const Tensor& scale_zero, int64_t k, int64_t n, int64_t group_size,
                         int64_t experts = 1) {
  STD_TORCH_CHECK(group_size == 32 || group_size == 64 || group_size == 128, "group_size is not 32, 64 or 128");
  STD_TORCH_CHECK(k > 0 && n > 0 && k < (1 << 30) && n < (1 << 30), "a product needs features to read and to write");
  const int64_t blocks = (n + kBlock - 1) / kBlock, groups = (k + group_size - 1) / group_size;
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() &&
                      weight.numel() == experts * blocks * groups * group_size * kBlock / 2,
                  "weight is not packed for layout native with these features and groups");
  STD_TORCH_CHECK(scale_zero.is_cpu() && scale_zero.scalar_type() == ScalarType::BFloat16 &&
                      scale_zero.is_contiguous() && scale_zero.numel() == experts * blocks * groups * kBlock * 2,
                  "scale_zero is not packed for layout native with these features and groups");
}

using Tensors = std::vector<Tensor>;

inline Rows rows_of_one(const void* data, int64_t rows) { return {{data}, {0, int32_t(rows)}, data ? 1 : 0}; }

// Returns matrices, or vectors, that belong together; `fits` says whether one has the right shape.
template <class Fits>
Rows rows_of_many(const Tensors& parts, const Tensor& like, const char* name, const Fits& fits) {
  check(parts.size() <= size_t(kMatrices), name, "be at most four");
  Rows rows{};
  for (const Tensor& part : parts) {
    check(part.is_cpu() && part.is_contiguous() && part.scalar_type() == like.scalar_type() && fits(part), name,
          "be contiguous, in x's dtype, with the features of x and of each other");
    rows.data[rows.count] = part.data_ptr();
    rows.first[rows.count + 1] = rows.first[rows.count] + int32_t(part.size(0));
    ++rows.count;
  }
  return rows;
}

// What is done before and after the sums of a product.
struct Around {
  const Rows bias;
  const Maybe& residual;
  const std::string& norm;
  const Maybe& norm_weight;
  const Maybe& norm_bias;
  double eps;
  const std::string& activation;
  bool gated;
};

inline bool has_rows(const Tensor& y, const Tensor& x, int64_t width) {
  return y.is_cpu() && y.scalar_type() == x.scalar_type() && y.dim() > 0 && rows_of(y) == rows_of(x) &&
         columns_of(y) == width;
}

// Whether products of any number of rows are ours, and not a library's.
inline bool any_rows(bool half) { return half && kernels().vectors; }

// Rows up to which a pass costs little more than one row: it runs on our threads and may be recorded.
inline int64_t few_rows(bool half, int64_t positions) {
  return positions > kFewPositions ? 0 : any_rows(half) ? 64 : 8;
}

inline Tensor library_linear(const Tensor& x, const Tensor& weight, const Maybe& bias) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(x), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A product of many rows: normalised here, multiplied by the library, finished here. Not recorded: its phases run now.
inline void run_wide(LinearCall& call, Tensor x, const Tensors& weights, const Tensors& biases) {
  check(!Tape::recording(), "a product of many rows", "not be recorded");
  LinearArgs& a = call.linear;
  const int most = threads();
  if (call.prepare.norm) {
    Tensor normalised = empty_rows(x, columns_of(x));
    call.prepare.out = {normalised.data_ptr(), nullptr, nullptr, nullptr, kAsGiven};
    run_beside_library(kernels().prepare, &call.prepare, parts_of(x.numel(), 1 << 13, most));
    x = normalised;
  }
  Tensors made;
  FinishArgs finish{{}, a};
  for (size_t i = 0; i < weights.size(); ++i) {
    made.push_back(library_linear(x, weights[i], biases.empty() ? Maybe() : Maybe(biases[i])));
    finish.product.data[i] = made[i].data_ptr();
    finish.product.first[i + 1] = a.dense.first[i + 1];
    finish.product.count = int32_t(i + 1);
  }
  const int64_t values = int64_t(a.rows) * a.out_features;
  run_beside_library(kernels().finish, &finish, parts_of(values, 1 << 13, most));
}

// Describes x and the norm of its rows.
inline void describe_norm(PrepareArgs& p, const Tensor& x, const std::string& norm, const Maybe& weight,
                          const Maybe& bias, double eps, Tensors& held) {
  const Strided in = rows_in(x, held, "x");
  p.dtype = dtype_of(x, "x");
  p.x = in.data;
  p.x_stride = in.stride;
  p.rows = int32_t(rows_of(x));
  p.in_features = int32_t(columns_of(x));
  p.norm = norm_of(norm);
  check((p.norm == kNoNorm) == !weight, "norm_weight", "be given where there is a norm, and only there");
  p.norm_weight = vector_of(weight, x, p.in_features, "norm_weight");
  p.norm_bias = vector_of(bias, x, p.in_features, "norm_bias");
  p.eps = float(eps);
}

// The rows of a residual [M, width], null without one.
inline Strided residual_of(const Maybe& residual, const Tensor& x, int64_t width, Tensors& held) {
  if (!residual) return {nullptr, 0};
  check(has_rows(*residual, x, width), "residual", "have y's dtype and shape");
  return rows_in(*residual, held, "residual");
}

// norm(x) + residual.
inline Tensor norm(const Tensor& x, const std::string& norm, const Tensor& weight, const Maybe& bias, double eps,
                   const Maybe& residual) {
  Tensors held;
  PrepareArgs p{};
  describe_norm(p, x, norm, weight, bias, eps, held);
  const Strided added = residual_of(residual, x, p.in_features, held);
  p.residual = added.data;
  p.residual_stride = added.stride;
  p.group_size = kLargestGroup;
  Tensor y = empty_rows(x, p.in_features);
  p.out = {y.data_ptr(), nullptr, nullptr, nullptr, kAsGiven};
  const int most = threads();
  const int parts = std::min(p.rows, parts_of(x.numel(), 1 << 14, most));
  if (p.rows > 0) Call<PrepareArgs>(p).run({{kernels().prepare, parts}}, most);
  return y;
}

// Describes a product whose weights and format of activations the call has already; returns where it goes. `held` keeps
// what the call's addresses point to.
inline Tensor describe(LinearCall& call, const Tensor& x, int64_t out_features, int64_t group_size,
                       const Around& around, Tensors& held) {
  LinearArgs& a = call.linear;
  PrepareArgs& p = call.prepare;
  describe_norm(p, x, around.norm, around.norm_weight, around.norm_bias, around.eps, held);
  const int64_t width = around.gated ? out_features / 2 : out_features;
  STD_TORCH_CHECK(!around.gated || out_features % (2 * kBlock) == 0,
                  "a gated product has a multiple of 32 out_features");
  Tensor y = empty_rows(x, width);
  const Strided added = residual_of(around.residual, x, width, held);
  a.residual = added.data;
  a.residual_stride = added.stride;
  a.bias = around.bias;
  a.y = y.data_ptr();
  a.y_stride = width;
  a.dtype = p.dtype;
  a.rows = p.rows;
  a.in_features = p.in_features;
  a.out_features = int32_t(out_features);
  a.group_size = p.group_size = int32_t(group_size);
  a.activation = activation_of(around.activation);
  a.gated = around.gated;
  return y;
}

inline LinearCall quantized(const Tensor& weight, const Tensor& scale_zero) {
  LinearCall call;
  call.linear.x.format = kInt8;
  call.linear.weight = static_cast<const uint8_t*>(weight.data_ptr());
  call.linear.scale_zero = static_cast<const uint16_t*>(scale_zero.data_ptr());
  return call;
}

// The list of wanted blocks, which the call reads whenever it runs; null without one.
inline const int32_t* blocks_wanted(const Maybe& wanted, int64_t out_features, bool gated, const Maybe& residual) {
  if (!wanted) return nullptr;
  check(wanted->is_cpu() && wanted->scalar_type() == ScalarType::Int && wanted->is_contiguous() &&
            wanted->numel() == 1 + (out_features + kBlock - 1) / kBlock && !gated && !residual,
        "wanted",
        "be a count and as many int32 as there are blocks of 16 out_features, of a product without gate and residual");
  return static_cast<const int32_t*>(wanted->data_ptr());
}

inline Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scale_zero, const Maybe& bias,
                     int64_t out_features, int64_t group_size, const Maybe& residual, const std::string& norm,
                     const Maybe& norm_weight, const Maybe& norm_bias, double eps, const std::string& activation,
                     bool gated, const Maybe& wanted) {
  check(x.dim() > 0, "x", "have a dimension of features");
  check_weight(weight, scale_zero, columns_of(x), out_features, group_size);
  LinearCall call = quantized(weight, scale_zero);
  const Rows added = rows_of_one(vector_of(bias, x, out_features, "bias"), out_features);
  Tensors held;
  const Tensor y = describe(call, x, out_features, group_size,
                            {added, residual, norm, norm_weight, norm_bias, eps, activation, gated}, held);
  call.linear.wanted = blocks_wanted(wanted, out_features, gated, residual);
  call.run();
  return y;
}

inline Tensor experts(const Tensor& x, const Tensor& weight, const Tensor& scale_zero, const Tensor& expert,
                      int64_t out_features, int64_t group_size) {
  check(x.dim() == 2 && weight.dim() > 0 && weight.size(0) > 0, "x", "be a matrix, and weight a stack");
  check(expert.is_cpu() && expert.scalar_type() == ScalarType::Long && expert.is_contiguous() && expert.dim() == 1 &&
            expert.size(0) == x.size(0),
        "expert", "be contiguous, in int64, with a number for each row of x");
  check_weight(weight, scale_zero, columns_of(x), out_features, group_size, weight.size(0));
  LinearCall call = quantized(weight, scale_zero);
  call.linear.expert = static_cast<const int64_t*>(expert.data_ptr());
  call.linear.experts = int32_t(weight.size(0));
  Tensors held;
  const Tensor y = describe(call, x, out_features, group_size, {{}, {}, "none", {}, {}, 0, "none", false}, held);
  call.run();
  return y;
}

inline Tensor dense(const Tensor& x, Tensors weights, Tensors biases, const Maybe& residual, const std::string& norm,
                    const Maybe& norm_weight, const Maybe& norm_bias, double eps, const std::string& activation,
                    bool gated) {
  check(x.dim() > 0, "x", "have a dimension of features");
  check(!weights.empty() && (biases.empty() || biases.size() == weights.size()), "weights",
        "be one or more, and biases none or as many");
  const int64_t k = columns_of(x);
  LinearCall call;
  Rows& rows = call.linear.dense;
  rows = rows_of_many(weights, x, "weights", [&](const Tensor& w) { return w.dim() == 2 && w.size(1) == k; });
  const Rows bias = rows_of_many(biases, x, "biases", [&](const Tensor& b) { return b.dim() == 1; });
  for (int i = 0; i < bias.count; ++i)
    check(bias.first[i + 1] == rows.first[i + 1], "biases", "be as long as the weights have rows");
  const int64_t n = rows.first[rows.count];
  call.linear.x.format = x.scalar_type() == ScalarType::BFloat16 ? kernels().bfloat16 : kPlain;
  const bool half = x.scalar_type() != ScalarType::Float;
  Tensors held;
  const Tensor y =
      describe(call, x, n, kLargestGroup, {bias, residual, norm, norm_weight, norm_bias, eps, activation, gated}, held);
  const bool few = rows_of(x) <= few_rows(half, x.dim() == 3 ? x.size(1) : 1);
  if (!few && !any_rows(half)) {
    run_wide(call, held.empty() ? x : torch::stable::contiguous(x), weights, biases);
  } else {
    call.run(!few);
  }
  return y;
}

}  // namespace river
