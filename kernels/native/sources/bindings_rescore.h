// The operators on logits: the largest computed anew, and the entropy of their distribution.
#pragma once

#include "bindings_linear.h"

namespace river {

struct RescoreCall {
  PrepareArgs prepare{};
  RescoreArgs rescore{};

  static void run_prepare(const void* call, int part, int parts) {
    kernels().prepare(&static_cast<const RescoreCall*>(call)->prepare, part, parts);
  }
  static void run_rescore(const void* call, int part, int parts) {
    kernels().rescore(&static_cast<const RescoreCall*>(call)->rescore, part, parts);
  }
};

inline Tensor rescore(const Tensor& logits, const Tensor& x, const Tensor& weight, const Maybe& bias,
                      const std::string& norm, const Maybe& norm_weight, const Maybe& norm_bias, double eps) {
  check(x.dim() > 0 && weight.dim() == 2, "x", "have a dimension of features, and weight be a matrix");
  const int64_t k = columns_of(x), n = weight.size(0);
  check(weight.is_cpu() && weight.is_contiguous() && weight.scalar_type() == x.scalar_type() && weight.size(1) == k,
        "weight", "be contiguous, in x's dtype, with x's features");
  check(has_rows(logits, x, n), "logits", "have x's dtype and rows, and a column for each row of weight");
  kernels();  // (as in LinearCall::run)
  Tensors held;
  RescoreCall call;
  describe_norm(call.prepare, x, norm, norm_weight, norm_bias, eps, held);
  RescoreArgs& a = call.rescore;
  const Strided given = rows_in(logits, held, "logits");
  const int64_t groups = (k + kLargestGroup - 1) / kLargestGroup, rows = call.prepare.rows;
  const int64_t blocks = (n + kBlockOfLogits - 1) / kBlockOfLogits;
  Tensor y = empty_rows(x, n);
  if (rows == 0) return y;
  const int most = threads();
  a.ways = rows < most ? most : 1;
  const size_t values = size_t(rows * groups * kLargestGroup) * sizeof(float);
  char* memory = workspace(values + size_t(rows * a.ways * 2 * blocks) * sizeof(float));
  call.prepare.group_size = kLargestGroup;
  call.prepare.out = a.x = {memory, nullptr, nullptr, nullptr, kPlain};
  a.largest = reinterpret_cast<float*>(memory + values);
  a.logits = given.data;
  a.logits_stride = given.stride;
  a.weight = weight.data_ptr();
  a.bias = vector_of(bias, x, n, "bias");
  a.y = y.data_ptr();
  a.dtype = call.prepare.dtype;
  a.in_features = int32_t(k);
  a.padded_features = int32_t(groups * kLargestGroup);
  a.out_features = int32_t(n);
  const int parts = norm == "none" ? 1 : std::min<int>(int(rows), 4 * most);
  Call<RescoreCall>(call).run({{&RescoreCall::run_prepare, parts}, {&RescoreCall::run_rescore, int(rows * a.ways)}},
                              most);
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
  a.chunks = (a.logits_each + kLogitsTogether - 1) / kLogitsTogether;
  Tensor score = empty(nullptr, 0, aoti_torch_dtype_float32());
  a.score = static_cast<float*>(score.data_ptr());
  a.weighed = workspace(size_t(a.rows) * a.chunks * 3 * sizeof(float));
  const int most = threads(), parts = parts_of(int64_t(a.rows) * a.logits_each, 1 << 13, most);
  Call<EntropyArgs>(a).run({{kernels().weigh, parts}, {kernels().entropy, 1}}, most);
  return score;
}

}  // namespace river
