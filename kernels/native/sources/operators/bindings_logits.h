// The operators on logits: the largest recomputed, and the entropy of their distribution.
#pragma once

#include "operators/bindings_linear.h"

namespace river {

struct RescoreCall {
  PrepareArgs prepare{};
  RescoreArgs rescore{};
};

inline Tensor rescore(const Tensor& logits, const Tensor& x, const Tensor& weight, const Maybe& bias,
                      const NormOf& norm) {
  check(x.dim() > 0 && weight.dim() == 2, "x", "have a dimension of features, and weight be a matrix");
  const int64_t k = columns_of(x), n = weight.size(0);
  check(weight.is_cpu() && weight.is_contiguous() && weight.scalar_type() == x.scalar_type() && weight.size(1) == k,
        "weight", "be contiguous, in x's dtype, with x's features");
  check(has_rows(logits, x, n), "logits", "have x's dtype and rows, and a column for each row of weight");
  STD_TORCH_CHECK(k > 0, kNoFeatures);
  Tensors held;
  RescoreCall call;
  RescoreArgs& a = call.rescore;
  describe_norm(call.prepare, x, norm, held);
  Tensor y = empty_rows(x, n);
  const int64_t rows = call.prepare.rows;
  if (y.numel() == 0) return y;
  a.ways = rows < threads() ? threads() : 1;
  const int parts = int(std::min<int64_t>(rows * a.ways, 4 * threads()));
  a.rows = int32_t(rows);
  a.dtype = call.prepare.dtype;
  a.in_features = int32_t(k);
  a.padded_features = int32_t(call.prepare.groups() * kLargestGroup);
  a.out_features = int32_t(n);
  const size_t values = size_t(rows) * a.padded_features * sizeof(float);
  char* memory = workspace(values + size_t(parts) * 2 * ceil_div(n, kBlockOfLogits) * sizeof(float));
  call.prepare.out = a.x = {memory, nullptr, nullptr, nullptr, kFloats};
  a.largest = reinterpret_cast<float*>(memory + values);
  a.logits = rows_in(logits, held, "logits");
  a.weight = weight.data_ptr();
  a.bias = vector_of(bias, x, n, "bias");
  a.y = y.data_ptr();
  const int parts_of_norm = norm.weight ? std::min<int>(int(rows), 4 * threads()) : 1;
  run_phases(call, {{kernels().prepare, &call.prepare, parts_of_norm}, {kernels().rescore, &a, parts}});
  return y;
}

// Describes the choices of logits [M, V], adjacent but for the distance of rows, and runs them.
inline void run_choices(ChoiceArgs& a, const Tensor& logits, const void* first, int64_t rows, int64_t stride) {
  a.dtype = dtype_of(logits, "logits");
  a.logits = first;
  a.stride = stride;
  a.rows = int32_t(rows);
  a.logits_each = int32_t(columns_of(logits));
  a.chunks = int32_t(ceil_div(a.logits_each, kLogitsTogether));
  a.weighed = workspace(size_t(a.rows) * a.chunks * 3 * sizeof(float));
  const int parts = parts_of(int64_t(a.rows) * a.logits_each, 1 << 13);
  run_phases(a, {{kernels().weigh, &a, parts}, {kernels().choose, &a, 1}});
}

inline Tensor largest_entropy(const Tensor& logits) {
  check(logits.dim() == 3 && logits.is_cpu() && logits.stride(2) == 1 && logits.numel() > 0, "logits",
        "be [B, T, V] in the CPU's memory, not empty, those of a position adjacent");
  ChoiceArgs a{};
  Tensor score = empty(nullptr, 0, aoti_torch_dtype_float32());
  a.score = static_cast<float*>(score.data_ptr());
  const int64_t last = (logits.size(1) - 1) * logits.stride(1) * int64_t(logits.element_size());
  run_choices(a, logits, static_cast<const char*>(logits.data_ptr()) + last, logits.size(0), logits.stride(0));
  return score;
}

// Returns [N, 2] of float64: the number of each row's first largest logit, and the entropy, or 0 if it is not wanted.
inline Tensor choices(const Tensor& logits, bool entropies) {
  check(logits.dim() == 2 && logits.is_cpu() && logits.stride(1) == 1 && logits.size(1) > 0, "logits",
        "be [N, V] in the CPU's memory, those of a row adjacent");
  ChoiceArgs a{};
  const int64_t sizes[] = {logits.size(0), 2};
  Tensor out = empty(sizes, 2, aoti_torch_dtype_float64());
  a.choices = static_cast<double*>(out.data_ptr());
  a.only_largest = !entropies;
  run_choices(a, logits, logits.data_ptr(), logits.size(0), logits.stride(0));
  return out;
}

}  // namespace river
