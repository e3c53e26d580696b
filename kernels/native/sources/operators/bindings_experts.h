// Operators for mixtures of experts, whose weights are stacks: the choice, one matmul, and all of a layer's mixture.
#pragma once

#include <algorithm>
#include <tuple>
#include <utility>

#include "operators/bindings_linear.h"
#include "vectors/dtypes.h"

namespace river {

// A matmul with a stack of MXFP4 weights; `exponents` is what GemmArgs::exponents says.
inline LinearCall in_mxfp4(const Tensor& x, const Tensor& weight, const Tensor& exponents, int64_t k, int64_t n) {
  const int64_t experts = weight.size(0), groups = k / kMxGroup;
  check(x.scalar_type() == ScalarType::BFloat16, "x", "be bfloat16 to meet MXFP4 weights");
  check(n > 0 && k > 0 && k % kMxGroup == 0 && weight.is_cpu() && weight.is_contiguous() &&
            weight.numel() == experts * n * groups * (kMxGroup / 2) && exponents.is_cpu() &&
            exponents.is_contiguous() && exponents.numel() == experts * n * groups,
        "weight and scale_zero", "be contiguous blocks and scales of MXFP4 weights with these features");
  LinearCall call;
  call.gemm.experts = int32_t(experts);
  call.gemm.x.format = kernels().rows_of_bfloat16;
  call.gemm.weight = static_cast<const uint8_t*>(weight.data_ptr());
  call.gemm.exponents = static_cast<const uint8_t*>(exponents.data_ptr());
  return call;
}

// A matmul with a stack in x's dtype, which may be a view of one stored as [E, K, N].
inline LinearCall in_dtype_of(const Tensor& x, const Tensor& weight, int64_t k, int64_t n) {
  const bool fits = weight.is_cpu() && weight.scalar_type() == x.scalar_type() && weight.dim() == 3 &&
                    weight.size(1) == n && weight.size(2) == k && k > 0 && n > 0;
  const bool transposed = fits && !weight.is_contiguous();
  check(fits && (!transposed || (weight.stride(0) == n * k && weight.stride(1) == 1 && weight.stride(2) == n)),
        "weight", "be a contiguous stack in x's dtype, with these features");
  LinearCall call;
  call.gemm.experts = int32_t(weight.size(0));
  call.gemm.dense = {{weight.data_ptr()}, {0, int32_t(n)}, 1};
  call.gemm.transposed = transposed;
  call.gemm.x.format = x.scalar_type() == ScalarType::BFloat16 ? kernels().rows_of_bfloat16 : kFloats;
  return call;
}

// A matmul of rows that each choose one of a stack's matrices [N, K]: in 4 bits, 12 bits, MXFP4, or in x's dtype.
inline LinearCall stack_of(const Tensor& x, const Tensor& weight, const Maybe& side, int64_t k, int64_t n,
                           int64_t group_size) {
  check(weight.dim() > 0 && weight.size(0) > 0 && weight.size(0) < (1 << 30), "weight", "be a stack");
  const int64_t experts = weight.size(0);
  check(group_size == 0 || side.has_value(), "scale_zero", "be given with weights in 4 bits");
  if (group_size) return quantized(weight, *side, k, n, group_size, experts);
  if (weight.scalar_type() != ScalarType::Byte || !side) return in_dtype_of(x, weight, k, n);
  if (side->scalar_type() == ScalarType::Byte) return in_mxfp4(x, weight, *side, k, n);
  LinearCall call = in_12_bits(x, weight, *side, k, n, experts);
  call.gemm.x.format = kernels().rows_of_bfloat16;
  return call;
}

inline int64_t group_of(int64_t group_size) { return group_size ? group_size : kLargestGroup; }

inline Tensor experts(const Tensor& x, const Tensor& weight, const Maybe& scale_zero, const Tensor& expert,
                      int64_t out_features, int64_t group_size) {
  check(x.dim() == 2, "x", "be a matrix");
  check(expert.is_cpu() && expert.scalar_type() == ScalarType::Long && expert.is_contiguous() && expert.dim() == 1 &&
            expert.size(0) == x.size(0),
        "expert", "be contiguous, in int64, with a number for each row of x");
  LinearCall call = stack_of(x, weight, scale_zero, columns_of(x), out_features, group_size);
  call.gemm.expert = static_cast<const int64_t*>(expert.data_ptr());
  Tensors held;
  const Tensor y = describe(call, x, out_features, group_of(group_size), {}, {{}, {"none"}, "none"}, held);
  call.run();
  return y;
}

// The phases of a mixture: rows of x in the order of their experts, two matmuls, and the weighted sum.
struct MixtureCall {
  SortArgs sort{};
  LinearCall up, down;
  CombineArgs combine{};
  Pieces unpacked{};

  void run(bool beside_library) {
    place();
    const int64_t rows = sort.rows, features = combine.features;
    const auto prepared = [&](const LinearCall& of) {
      return std::min<int>(4 * threads(), parts_of(rows * of.gemm.padded_features(), 1 << 14));
    };
    const auto multiplied = [&](const LinearCall& of) {
      const int64_t n = of.gemm.epilogue.out_features, each = ceil_div(rows, of.gemm.experts);
      const int64_t read = std::min<int64_t>(rows, of.gemm.experts) * ceil_div(each, int64_t(4));
      return parts_of(read * n * of.gemm.padded_features(), 1 << 17);
    };
    const Kernels& k = kernels();
    run_phases(*this,
               {{k.sort, &sort, 1},
                {k.prepare, &up.prepare, prepared(up)},
                {k.gemm, &up.gemm, multiplied(up)},
                {k.prepare, &down.prepare, prepared(down)},
                {k.gemm, &down.gemm, multiplied(down)},
                {k.combine_experts, &combine, parts_of(rows * features, 1 << 14)}},
               beside_library);
  }

 private:
  void place() {
    const size_t rows = sort.rows, value = bytes_of(combine.dtype);
    const size_t wide = whole_lines(rows * 8), narrow = whole_lines(rows * 4);
    const size_t starts = whole_lines((size_t(sort.experts) + 2) * 4);
    const size_t hidden = whole_lines(rows * down.gemm.in_features * value);
    const size_t results = whole_lines(rows * combine.features * value);
    const size_t first = activation_bytes(up.gemm), second = activation_bytes(down.gemm);
    char* at = workspace(wide + 2 * narrow + starts + hidden + results + first + second);
    const auto take = [&](size_t bytes) { return std::exchange(at, at + bytes); };
    sort.expert = reinterpret_cast<int64_t*>(take(wide));
    sort.order = reinterpret_cast<int32_t*>(take(narrow));
    sort.place = reinterpret_cast<int32_t*>(take(narrow));
    sort.starts = reinterpret_cast<int32_t*>(take(starts));
    up.gemm.expert = down.gemm.expert = sort.expert;
    up.prepare.order = sort.order;
    combine.place = sort.place;
    up.gemm.epilogue.y.data = take(hidden);
    down.prepare.x.data = up.gemm.epilogue.y.data;
    down.gemm.epilogue.y.data = take(results);
    combine.values = down.gemm.epilogue.y.data;
    place_activations(up.gemm, up.prepare, take(first));
    place_activations(down.gemm, down.prepare, take(second));
    if (!up.gemm.is_unpacked() && !down.gemm.is_unpacked()) return;
    const Pieces* pieces = pieces_for(std::max(up.gemm.unpacked_bytes(), down.gemm.unpacked_bytes()), &unpacked);
    up.gemm.unpacked = down.gemm.unpacked = pieces;
  }
};

// Completes one of a mixture's matmuls, of `rows` rows of k features each, in x's dtype; memory comes later.
inline void describe_stack(LinearCall& call, const Tensor& x, int64_t rows, int64_t k, int64_t n, int64_t group_size,
                           const Maybe& bias, const char* name) {
  GemmArgs& a = call.gemm;
  PrepareArgs& p = call.prepare;
  p.dtype = dtype_of(x, "x");
  p.rows = a.rows = int32_t(rows);
  p.in_features = a.in_features = int32_t(k);
  p.group_size = a.group_size = int32_t(group_of(group_size));
  p.x = {nullptr, k};
  p.each = 1;
  a.epilogue.dtype = p.dtype;
  a.epilogue.out_features = int32_t(n);
  a.epilogue.y = {nullptr, n};
  if (!bias) return;
  check(bias->dim() == 2 && bias->size(0) == a.experts && bias->size(1) == n, name, "be a row for each expert");
  a.epilogue.bias = {{vector_of(bias, x, a.experts * n, name)}, {0, int32_t(n)}, 1};
}

inline Tensor mixture(const Tensor& x, const Tensor& index, const Tensor& weight, const Tensor& up,
                      const Maybe& up_side, const Maybe& up_bias, int64_t up_group, const Tensor& down,
                      const Maybe& down_side, const Maybe& down_bias, int64_t down_group, int64_t features,
                      const std::string& activation, bool pairs, const Maybe& residual) {
  check(x.dim() == 2 && x.is_contiguous() && x.size(1) > 0, "x", "be a contiguous matrix");
  check(index.is_cpu() && index.scalar_type() == ScalarType::Long && index.is_contiguous() && index.dim() == 2 &&
            index.size(0) == x.size(0) && index.size(1) > 0,
        "index", "be contiguous, in int64, with as many numbers for each row of x");
  check(weight.is_cpu() && weight.is_contiguous() && weight.dim() == 2 && weight.size(0) == x.size(0) &&
            weight.size(1) == index.size(1),
        "weight", "be contiguous, with a number for each of index");
  check(features > 0 && features % kBlock == 0, "features", "be a multiple of 16");
  const int64_t tokens = x.size(0), k = x.size(1), each = index.size(1), rows = tokens * each;
  check(rows < (1 << 30), "index", "have fewer numbers");
  Tensors held;
  MixtureCall call;
  call.up = stack_of(x, up, up_side, k, 2 * features, up_group);
  call.down = stack_of(x, down, down_side, features, k, down_group);
  check(call.up.gemm.experts == call.down.gemm.experts, "up and down", "have as many experts");
  describe_stack(call.up, x, rows, k, 2 * features, up_group, up_bias, "up_bias");
  describe_stack(call.down, x, rows, features, k, down_group, down_bias, "down_bias");
  call.up.prepare.x = {x.data_ptr(), k};
  call.up.prepare.each = int32_t(each);
  Epilogue& e = call.up.gemm.epilogue;
  e.activation = activation_of(activation);
  e.gated = pairs ? kGatePairs : kGateFirst;
  e.y.stride = features;
  call.sort.chosen = static_cast<const int64_t*>(index.data_ptr());
  call.sort.rows = int32_t(rows);
  call.sort.experts = call.up.gemm.experts;
  Tensor y = empty_rows(x, k);
  CombineArgs& c = call.combine;
  c.weight = weight.data_ptr();
  c.weight_dtype = dtype_of(weight, "weight");
  c.residual = residual_of(residual, x, k, held);
  c.y = y.data_ptr();
  c.dtype = dtype_of(x, "x");
  c.rows = int32_t(tokens);
  c.each = int32_t(each);
  c.features = int32_t(k);
  if (rows > 0) call.run(tokens > few_rows(true, 1));
  return y;
}

inline std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t each, const std::string& routing, bool floats) {
  Tensors held;
  check(logits.dim() == 2 && logits.size(1) <= kMostExperts, "logits", "be a matrix of at most 1024 columns");
  check(each > 0 && each <= logits.size(1), "each", "be a number of columns");
  const int64_t sizes[] = {logits.size(0), each};
  Tensor weight = floats ? empty(sizes, 2, aoti_torch_dtype_float32()) : empty(sizes, 2, logits);
  Tensor index = empty(sizes, 2, aoti_torch_dtype_int64());
  RouteArgs a{rows_in(logits, held, "logits"), weight.data_ptr(), static_cast<int64_t*>(index.data_ptr())};
  a.dtype = dtype_of(logits, "logits");
  a.weight_dtype = dtype_of(weight, "logits");
  a.rows = int32_t(logits.size(0));
  a.experts = int32_t(logits.size(1));
  a.each = int32_t(each);
  a.routing = number_of(routing, {"all", "all_normalised", "chosen"}, "routing");
  if (a.rows > 0) run_phases(a, {{kernels().route, &a, parts_of(logits.numel() * each, 1 << 13)}});
  return {weight, index};
}

}  // namespace river
