// What the operators ask of tensors: dtypes, rows, strides, new ones.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "operators/tape.h"
#include "phases.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace river {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

inline void check(bool holds, const char* name, const char* what) { STD_TORCH_CHECK(holds, name, " must ", what); }

inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

inline int64_t columns_of(const Tensor& x) { return x.size(x.dim() - 1); }

// Whether all rows of adjacent features lie `stride` elements apart, as those of every text's last position do.
inline bool rows_apart(const Tensor& x, int64_t* stride) {
  int64_t rows = 1;
  *stride = columns_of(x);
  for (int64_t i = x.dim() - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (rows == 1) *stride = x.stride(i);
    if (x.stride(i) != *stride * rows) return false;
    rows *= x.size(i);
  }
  return x.stride(x.dim() - 1) == 1;
}

// Returns the rows of a tensor; `held` keeps a copy if needed, which a tape forbids: it would hold one step's values.
inline Strided rows_in(const Tensor& x, Tensors& held, const char* name) {
  check(x.is_cpu() && x.dim() > 0, name, "lie in the CPU's memory and have a dimension of features");
  if (x.is_contiguous()) return {x.data_ptr(), columns_of(x)};
  int64_t stride;
  if (rows_apart(x, &stride)) return {x.data_ptr(), stride};
  check(!Tape::recording(), name, "be contiguous to be recorded");
  held.push_back(torch::stable::contiguous(x));
  return {held.back().data_ptr(), columns_of(x)};
}

// Returns the address of a vector, null without one.
inline const void* vector_of(const Maybe& x, const Tensor& like, int64_t size, const char* name) {
  if (!x) return nullptr;
  check(x->is_cpu() && x->scalar_type() == like.scalar_type() && x->is_contiguous() && x->numel() == size, name,
        "be contiguous, with x's dtype and as many elements as features");
  return x->data_ptr();
}

// A new contiguous tensor, which the tape keeps if there is one.
inline Tensor empty(const int64_t* sizes, int64_t dims, int32_t dtype) {
  constexpr int64_t kMost = 8;
  check(dims <= kMost, "x", "have at most 8 dimensions");
  int64_t strides[kMost], stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), -1, &made));
  Tensor tensor(made);
  if (Tape* tape = Tape::recording()) tape->hold(tensor);
  return tensor;
}

inline Tensor empty(const int64_t* sizes, int64_t dims, const Tensor& like) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(sizes, dims, dtype);
}

inline Tensor empty_rows(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = i + 1 == x.dim() ? columns : x.size(i);
  return empty(sizes.data(), x.dim(), x);
}

inline int32_t number_of(const std::string& name, std::initializer_list<const char*> names, const char* what) {
  const auto found = std::find(names.begin(), names.end(), name);
  STD_TORCH_CHECK(found != names.end(), what, "='", name, "' is not known");
  return int32_t(found - names.begin());
}
inline int32_t norm_of(const std::string& name) {
  return number_of(name, {"none", "rms", "rms_plus_one", "layer"}, "norm");
}
inline int32_t activation_of(const std::string& name) {
  return number_of(name, {"none", "silu", "gelu", "gelu_tanh", "relu", "clamped_swish"}, "activation");
}

constexpr int kFewPositions = 16;  // up to which each attends by itself, and passes run on our threads

// The library of phases that the operators use, chosen by the address of its table.
inline std::atomic<const Kernels*> chosen{nullptr};

inline void use_kernels(int64_t address) { chosen = reinterpret_cast<const Kernels*>(address); }

inline const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  STD_TORCH_CHECK(table, "no library of kernels was chosen; call river_compile.kernels.native.load()");
  return *table;
}

}  // namespace river
