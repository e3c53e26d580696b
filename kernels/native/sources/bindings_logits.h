// The operators on logits: the largest computed anew, and the entropy of their distribution.
#pragma once

#include "bindings_linear.h"

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
  Tensors held;
  RescoreCall call;
  RescoreArgs& a = call.rescore;
  describe_norm(call.prepare, x, norm, held);
  Tensor y = empty_rows(x, n);
  const int64_t rows = call.prepare.rows;
  if (rows == 0) return y;
  a.ways = rows < threads() ? threads() : 1;
  a.dtype = call.prepare.dtype;
  a.in_features = int32_t(k);
  a.padded_features = int32_t(call.prepare.groups() * kLargestGroup);
  a.out_features = int32_t(n);
  const size_t values = size_t(rows) * a.padded_features * sizeof(float), parts = rows * a.ways;
  char* memory = workspace(values + parts * 2 * ceil_div(n, kBlockOfLogits) * sizeof(float));
  call.prepare.out = a.x = {memory, nullptr, nullptr, nullptr, kFloats};
  a.largest = reinterpret_cast<float*>(memory + values);
  a.logits = rows_in(logits, held, "logits");
  a.weight = weight.data_ptr();
  a.bias = vector_of(bias, x, n, "bias");
  a.y = y.data_ptr();
  const int parts_of_norm = norm.weight ? std::min<int>(int(rows), 4 * threads()) : 1;
  run_phases(call, {{kernels().prepare, &call.prepare, parts_of_norm}, {kernels().rescore, &a, int(parts)}});
  return y;
}

inline Tensor largest_entropy(const Tensor& logits) {
  check(logits.dim() == 3 && logits.is_cpu() && logits.stride(2) == 1 && logits.size(1) > 0 && logits.size(2) > 0,
        "logits", "be [B, T, V] in the CPU's memory, those of a position adjacent");
  EntropyArgs a{};
  a.dtype = dtype_of(logits, "logits");
  a.stride = logits.stride(0);
  a.logits = static_cast<const char*>(logits.data_ptr()) +
             (logits.size(1) - 1) * logits.stride(1) * int64_t(logits.element_size());
  a.rows = int32_t(logits.size(0));
  a.logits_each = int32_t(logits.size(2));
  a.chunks = int32_t(ceil_div(a.logits_each, kLogitsTogether));
  Tensor score = empty(nullptr, 0, aoti_torch_dtype_float32());
  a.score = static_cast<float*>(score.data_ptr());
  a.weighed = workspace(size_t(a.rows) * a.chunks * 3 * sizeof(float));
  const int parts = parts_of(int64_t(a.rows) * a.logits_each, 1 << 13);
  run_phases(a, {{kernels().weigh, &a, parts}, {kernels().entropy, &a, 1}});
  return score;
}

}  // namespace river
