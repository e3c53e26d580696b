// The operators torch.ops.river_native.*: from tensors to phases. Written against torch's stable ABI.
//
//   linear        x W^T + bias with 4-bit weights, a new tensor
//   linear_out    the same into a given tensor
//   use_kernels   chooses the library of phases, by the address of its table
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <new>
#include <optional>

#include "phases.h"
#include "runner.h"

namespace river {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<const Kernels*> chosen{nullptr};

void use_kernels(int64_t address) { chosen = reinterpret_cast<const Kernels*>(address); }

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  STD_TORCH_CHECK(table, "no library of kernels was chosen; call river_compile.kernels.native.load()");
  return *table;
}

// Memory of the calling thread that grows and is kept, for what lives during one call.
char* workspace(size_t bytes) {
  static thread_local struct Kept {
    char* data = nullptr;
    size_t size = 0;
    ~Kept() { std::free(data); }
  } kept;
  if (kept.size < bytes) {
    std::free(kept.data);
    kept.size = (bytes + 4095) / 4096 * 4096;
    kept.data = static_cast<char*>(std::aligned_alloc(64, kept.size));
    if (!kept.data) {
      kept.size = 0;
      throw std::bad_alloc();
    }
  }
  return kept.data;
}

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: STD_TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
  }
}

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// Both phases of one product, and the place between them.
struct LinearCall {
  PrepareArgs prepare{};
  LinearArgs linear{};
  int prepare_parts = 1, linear_parts = 1;

  size_t bytes() const {
    const size_t groups = groups_of_rows();
    return aligned(groups * linear.group_size * element_size()) + 3 * aligned(groups * 4);
  }

  void place(char* memory) {
    const size_t groups = groups_of_rows();
    Activations& x = linear.x;
    x.values = memory;
    x.scale = reinterpret_cast<float*>(memory += aligned(groups * linear.group_size * element_size()));
    x.sum = reinterpret_cast<float*>(memory += aligned(groups * 4));
    x.start = reinterpret_cast<int32_t*>(memory + aligned(groups * 4));
    prepare.out = x;
  }

  void split(int threads) {
    const int64_t values = int64_t(groups_of_rows()) * linear.group_size;
    const int64_t weights = (linear.out_features + kBlock - 1) / kBlock * (values / linear.rows) * kBlock;
    prepare_parts = parts(values, 1 << 14, threads);
    linear_parts = parts(weights * ((linear.rows + 3) / 4), 1 << 17, threads);
  }

  void run(int threads) const {
    const Phase phases[] = {{kernels().prepare, &prepare, prepare_parts}, {kernels().linear, &linear, linear_parts}};
    Runner::instance().run(phases, 2, threads);
  }

 private:
  // Four parts for each thread even out what the threads' cores are given; smaller ones than `least` cost more than
  // that.
  static int parts(int64_t work, int64_t least, int threads) {
    return int(std::max<int64_t>(1, std::min<int64_t>(work / least, 4 * threads)));
  }
  size_t element_size() const { return linear.x.format == kInt8 ? 1 : 4; }
  size_t groups_of_rows() const {
    return size_t(linear.rows) * ((linear.in_features + linear.group_size - 1) / linear.group_size);
  }
};

void check_weight(const Tensor& weight, const Tensor& scale_zero, int64_t k, int64_t n, int64_t group_size) {
  STD_TORCH_CHECK(group_size == 32 || group_size == 64 || group_size == 128, "group_size is not 32, 64 or 128");
  STD_TORCH_CHECK(k > 0 && n > 0 && k < (1 << 30) && n < (1 << 30), "a product needs features to read and to write");
  const int64_t blocks = (n + kBlock - 1) / kBlock, groups = (k + group_size - 1) / group_size;
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() &&
                      weight.numel() == blocks * groups * group_size * kBlock / 2,
                  "weight is not packed for layout native with these features and groups");
  STD_TORCH_CHECK(scale_zero.is_cpu() && scale_zero.scalar_type() == ScalarType::BFloat16 &&
                      scale_zero.is_contiguous() && scale_zero.numel() == blocks * groups * kBlock * 2,
                  "scale_zero is not packed for layout native with these features and groups");
}

void linear_out(const Tensor& x, const Tensor& weight, const Tensor& scale_zero, const std::optional<Tensor>& bias,
                int64_t out_features, int64_t group_size, bool int8_activations, Tensor y) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() > 0, "x must lie in the CPU's memory and have a dimension of features");
  const int64_t k = x.size(x.dim() - 1), rows = rows_of(x);
  check_weight(weight, scale_zero, k, out_features, group_size);
  const Dtype dtype = dtype_of(x);
  STD_TORCH_CHECK(y.is_cpu() && y.scalar_type() == x.scalar_type() && y.dim() > 0 && rows_of(y) == rows &&
                      y.size(y.dim() - 1) == out_features,
                  "y must have x's dtype and rows, and out_features columns");
  STD_TORCH_CHECK(y.is_contiguous() || (y.dim() == 2 && y.stride(1) == 1), "y must have rows of adjacent elements");
  if (bias)
    STD_TORCH_CHECK(bias->is_cpu() && bias->scalar_type() == x.scalar_type() && bias->is_contiguous() &&
                        bias->numel() == out_features,
                    "bias must be contiguous, with x's dtype and out_features elements");
  if (rows == 0) return;
  const bool as_it_is = x.is_contiguous() || (x.dim() == 2 && x.stride(1) == 1);
  const Tensor held = as_it_is ? x : torch::stable::contiguous(x);

  LinearCall call;
  LinearArgs& a = call.linear;
  a.x.format = int8_activations ? kInt8 : kSingle;
  a.weight = static_cast<const uint8_t*>(weight.data_ptr());
  a.scale_zero = static_cast<const uint16_t*>(scale_zero.data_ptr());
  a.bias = bias ? bias->data_ptr() : nullptr;
  a.y = y.data_ptr();
  a.y_stride = y.is_contiguous() ? out_features : y.stride(0);
  a.dtype = dtype;
  a.rows = int32_t(rows);
  a.in_features = int32_t(k);
  a.out_features = int32_t(out_features);
  a.group_size = int32_t(group_size);
  call.prepare = {held.data_ptr(), held.is_contiguous() ? k : held.stride(0), {}, dtype, a.rows, a.in_features,
                  a.group_size};
  const int threads = int(torch::stable::get_num_threads());
  call.place(workspace(call.bytes()));
  call.split(threads);
  call.run(threads);
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scale_zero, const std::optional<Tensor>& bias,
              int64_t out_features, int64_t group_size, bool int8_activations) {
  constexpr int64_t kMost = 8;
  int64_t sizes[kMost], strides[kMost];
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(0 < dims && dims <= kMost, "x must have 1 to 8 dimensions");
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    sizes[i] = i == dims - 1 ? out_features : x.size(i);
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t dtype;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), -1, &made));
  Tensor y(made);
  linear_out(x, weight, scale_zero, bias, out_features, group_size, int8_activations, y);
  return y;
}

}  // namespace
}  // namespace river

STABLE_TORCH_LIBRARY_FRAGMENT(river_native, m) {
  m.def(
      "linear(Tensor x, Tensor weight, Tensor scale_zero, Tensor? bias, int out_features, int group_size, "
      "bool int8_activations) -> Tensor");
  m.def(
      "linear_out(Tensor x, Tensor weight, Tensor scale_zero, Tensor? bias, int out_features, int group_size, "
      "bool int8_activations, Tensor(a!) y) -> ()");
  m.def("use_kernels(int address) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(river_native, CPU, m) {
  m.impl("linear", TORCH_BOX(&river::linear));
  m.impl("linear_out", TORCH_BOX(&river::linear_out));
}

STABLE_TORCH_LIBRARY_IMPL(river_native, CompositeExplicitAutograd, m) {
  m.impl("use_kernels", TORCH_BOX(&river::use_kernels));
}
