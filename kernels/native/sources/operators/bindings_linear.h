// Operators for matmuls with 4-bit, 8-bit or 12-bit weights, or in the activations' dtype: from tensors to phases.
#pragma once

#include "operators/tensors.h"

namespace river {

struct NormOf {
  std::string name;
  Maybe weight, bias;
  double eps;
};

struct Fused {
  Maybe residual;
  NormOf norm;
  std::string activation;
  bool gated;
};

inline size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

inline size_t bytes_of_values(const GemmArgs& gemm) {
  const int32_t format = gemm.x.format;
  const size_t element = format == kInt8 ? 1 : format == kAmxTiles || format == kBFloat16Rows ? 2 : 4;
  const size_t spare = format == kAmxTiles && gemm.rows > kBlock ? kBlock - 1 : 0;  // of the last block of rows
  return whole_lines((gemm.rows + spare) * gemm.padded_features() * element);
}

inline size_t bytes_of_groups(const GemmArgs& gemm) { return whole_lines(size_t(gemm.rows) * gemm.groups() * 4); }

// Bytes of prepared activations.
inline size_t activation_bytes(const GemmArgs& gemm) { return bytes_of_values(gemm) + 3 * bytes_of_groups(gemm); }

inline void place_activations(GemmArgs& gemm, PrepareArgs& prepare, char* memory) {
  Activations& x = gemm.x;
  x.values = memory;
  x.scale = reinterpret_cast<float*>(memory += bytes_of_values(gemm));
  x.sum = reinterpret_cast<float*>(memory += bytes_of_groups(gemm));
  x.start = reinterpret_cast<int32_t*>(memory + bytes_of_groups(gemm));
  prepare.out = x;
}

// Pieces of so many bytes: the recorded tape's, or `now` of this call.
inline const Pieces* pieces_for(int64_t bytes, Pieces* now) {
  if (Tape* tape = Tape::recording()) return tape->pieces(bytes);
  *now = pieces_of(bytes);
  return now;
}

struct LinearCall {
  PrepareArgs prepare{};
  GemmArgs gemm{};
  Pieces unpacked{};

  // In one of torch's parallel loops, or one for each phase if the call lies between calls of a library.
  void run(bool beside_library = false) {
    if (gemm.rows == 0 || gemm.epilogue.out_features == 0) return;
    check(!beside_library || !Tape::recording(), "a matmul of many rows", "not be recorded");
    place();
    const int64_t k = gemm.padded_features(), weights = ceil_div(gemm.epilogue.out_features, kBlock) * kBlock * k;
    const int rows = prepare.norm ? gemm.rows : 4 * threads();
    const int parts = std::min(rows, parts_of(gemm.rows * k, 1 << 14));
    const int parts_of_weights = parts_of(weights * ((gemm.rows + 3) / 4), 1 << 17);
    run_phases(*this, {{kernels().prepare, &prepare, parts}, {kernels().gemm, &gemm, parts_of_weights}},
               beside_library);
  }

 private:
  void place() {
    place_activations(gemm, prepare, workspace(activation_bytes(gemm)));
    if (gemm.is_unpacked()) gemm.unpacked = pieces_for(gemm.unpacked_bytes(), &unpacked);
  }
};

inline constexpr char kNoFeatures[] = "a matmul needs features to read and to write";

inline LinearCall quantized(const Tensor& weight, const Tensor& scale_zero, int64_t k, int64_t n, int64_t group_size,
                            int64_t experts = 1) {
  STD_TORCH_CHECK(group_size == 32 || group_size == 64 || group_size == 128, "group_size is not 32, 64 or 128");
  STD_TORCH_CHECK(k > 0 && n > 0 && k < (1 << 30) && n < (1 << 30), kNoFeatures);
  const int64_t blocks = experts * ceil_div(n, kBlock), groups = ceil_div(k, group_size);
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() &&
                      weight.numel() == blocks * groups * group_size * kBlock / 2,
                  "weight is not packed for layout native with these features and groups");
  STD_TORCH_CHECK(scale_zero.is_cpu() && scale_zero.scalar_type() == ScalarType::BFloat16 &&
                      scale_zero.is_contiguous() && scale_zero.numel() == blocks * groups * kBlock * 2,
                  "scale_zero is not packed for layout native with these features and groups");
  LinearCall call;
  call.gemm.x.format = kInt8;
  call.gemm.weight = static_cast<const uint8_t*>(weight.data_ptr());
  call.gemm.scale_zero = static_cast<const uint16_t*>(scale_zero.data_ptr());
  call.gemm.experts = int32_t(experts);
  return call;
}

// A matmul with weights of bfloat16 in 12 bits; `side` is what GemmArgs::palette says.
inline LinearCall in_12_bits(const Tensor& x, const Tensor& units, const Tensor& side, int64_t k, int64_t n,
                             int64_t experts = 1) {
  const int64_t fours = ceil_div(n, kBlock) * kBlock / kFour, across = ceil_div(k, kUnit);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be bfloat16, as the weights in 12 bits are");
  STD_TORCH_CHECK(n > 0 && k > 0 && units.is_cpu() && units.scalar_type() == ScalarType::Byte &&
                      units.is_contiguous() && units.numel() == experts * fours * across * kUnitBytes,
                  "weight is not packed in 12 bits with these features");
  const auto* numbers = static_cast<const int32_t*>(side.data_ptr());
  const int64_t each = side.numel() / experts;
  bool fits = side.is_cpu() && side.scalar_type() == ScalarType::Int && side.is_contiguous() && each >= 5 + fours;
  for (int64_t i = 0; fits && i < experts; ++i) fits = each >= 5 + fours + 2 * int64_t(numbers[i * each + 4 + fours]);
  STD_TORCH_CHECK(fits, "scale_zero is not the palette and the patches of weights in 12 bits with these features");
  LinearCall call;
  call.gemm.side_each = each;
  call.gemm.experts = int32_t(experts);
  call.gemm.x.format = kernels().bfloat16;
  call.gemm.weight = static_cast<const uint8_t*>(units.data_ptr());
  call.gemm.palette = numbers;
  return call;
}

// A matmul with weights [N, K] in 8 bits; scales [N, 1], or of integers [N, K / 32].
inline LinearCall in_8_bits(const Tensor& x, const Tensor& weight, const Tensor& scale, int64_t n) {
  const int64_t k = columns_of(x), groups = scale.dim() == 2 ? scale.size(1) : 0;
  const bool floats = weight.scalar_type() == ScalarType::Float8_e4m3fn;
  STD_TORCH_CHECK(n > 0 && k > 0 && weight.is_cpu() && weight.is_contiguous() && weight.dim() == 2 &&
                      weight.size(0) == n && weight.size(1) == k,
                  "weight in 8 bits does not have these features");
  STD_TORCH_CHECK(scale.is_cpu() && scale.scalar_type() == ScalarType::Float && scale.is_contiguous() && groups > 0 &&
                      scale.size(0) == n && (groups == 1 || (!floats && k == 32 * groups)),
                  "scale_zero must be float32, with a scale for each row of the weight, or for 32 integers of it");
  LinearCall call;
  call.gemm.x.format = kFloats;
  call.gemm.weight = static_cast<const uint8_t*>(weight.data_ptr());
  call.gemm.scale = static_cast<const float*>(scale.data_ptr());
  call.gemm.in_8_bits = floats ? kFloat8s : kInt8s;
  call.gemm.grouped = groups > 1;
  return call;
}

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

inline bool has_rows(const Tensor& y, const Tensor& x, int64_t width) {
  return y.is_cpu() && y.scalar_type() == x.scalar_type() && y.dim() > 0 && rows_of(y) == rows_of(x) &&
         columns_of(y) == width;
}

// Whether matmuls of any number of rows are ours, and not a library's.
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

// A matmul of many rows: normalised here, multiplied by the library, finished here. Not recorded: its phases run now.
inline void run_library(const LinearCall& call, Tensor x, const Tensors& weights, const Tensors& biases) {
  check(!Tape::recording(), "a matmul of many rows", "not be recorded");
  PrepareArgs prepare = call.prepare;
  if (prepare.norm) {
    Tensor normalised = empty_rows(x, columns_of(x));
    prepare.out = {normalised.data_ptr(), nullptr, nullptr, nullptr, kUnchanged};
    run_phases(prepare, {{kernels().prepare, &prepare, parts_of(x.numel(), 1 << 13)}}, true);
    x = normalised;
  }
  Tensors made;
  LibraryEpilogueArgs a{call.gemm.dense, call.gemm.epilogue, call.gemm.rows};
  a.epilogue.bias = {};
  for (size_t i = 0; i < weights.size(); ++i) {
    made.push_back(library_linear(x, weights[i], biases.empty() ? Maybe() : Maybe(biases[i])));
    a.product.data[i] = made[i].data_ptr();
  }
  const int64_t values = int64_t(a.rows) * a.epilogue.out_features;
  run_phases(a, {{kernels().gemm_epilogue, &a, parts_of(values, 1 << 13)}}, true);
}

inline void describe_norm(PrepareArgs& p, const Tensor& x, const NormOf& norm, Tensors& held) {
  p.x = rows_in(x, held, "x");
  p.dtype = dtype_of(x, "x");
  p.rows = int32_t(rows_of(x));
  p.in_features = int32_t(columns_of(x));
  p.group_size = kLargestGroup;
  p.norm = norm_of(norm.name);
  check((p.norm == kNoNorm) == !norm.weight, "norm_weight", "be given where there is a norm, and only there");
  p.norm_weight = vector_of(norm.weight, x, p.in_features, "norm_weight");
  p.norm_bias = vector_of(norm.bias, x, p.in_features, "norm_bias");
  p.eps = float(norm.eps);
}

// The rows of a residual [M, width], null without one.
inline Strided residual_of(const Maybe& residual, const Tensor& x, int64_t width, Tensors& held) {
  if (!residual) return {nullptr, 0};
  check(has_rows(*residual, x, width), "residual", "have y's dtype and shape");
  return rows_in(*residual, held, "residual");
}

inline Tensor norm(const Tensor& x, const NormOf& norm, const Maybe& residual) {
  Tensors held;
  PrepareArgs p{};
  describe_norm(p, x, norm, held);
  p.residual = residual_of(residual, x, p.in_features, held);
  Tensor y = empty_rows(x, p.in_features);
  p.out = {y.data_ptr(), nullptr, nullptr, nullptr, kUnchanged};
  if (x.numel() > 0) run_phases(p, {{kernels().prepare, &p, std::min(p.rows, parts_of(x.numel(), 1 << 14))}});
  return y;
}

// Completes a matmul whose weights and format are set; returns its output. `held` keeps tensors alive for the call.
inline Tensor describe(LinearCall& call, const Tensor& x, int64_t out_features, int64_t group_size, const Rows& bias,
                       const Fused& fused, Tensors& held) {
  GemmArgs& a = call.gemm;
  PrepareArgs& p = call.prepare;
  Epilogue& e = a.epilogue;
  describe_norm(p, x, fused.norm, held);
  STD_TORCH_CHECK(!fused.gated || out_features % (2 * kBlock) == 0, "a gated matmul has a multiple of 32 out_features");
  const int64_t width = fused.gated ? out_features / 2 : out_features;
  Tensor y = empty_rows(x, width);
  e.bias = bias;
  e.residual = residual_of(fused.residual, x, width, held);
  e.y = {y.data_ptr(), width};
  e.dtype = p.dtype;
  e.out_features = int32_t(out_features);
  e.activation = activation_of(fused.activation);
  e.gated = fused.gated;
  a.rows = p.rows;
  a.in_features = p.in_features;
  a.group_size = p.group_size = int32_t(group_size);
  return y;
}

// The list of blocks to compute, which the call reads whenever it runs; null without one.
inline const int32_t* vocab_blocks_of(const Maybe& vocab_blocks, int64_t out_features, const Fused& fused) {
  if (!vocab_blocks) return nullptr;
  check(vocab_blocks->is_cpu() && vocab_blocks->scalar_type() == ScalarType::Int && vocab_blocks->is_contiguous() &&
            vocab_blocks->numel() == 1 + ceil_div(out_features, kBlock) && !fused.gated && !fused.residual,
        "vocab_blocks",
        "be a count and as many int32 as there are blocks of 16 out_features, of a matmul without gate and residual");
  return static_cast<const int32_t*>(vocab_blocks->data_ptr());
}

inline Tensor dense(const Tensor& x, const Tensors& weights, const Tensors& biases, const Fused& fused);

inline Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scale_zero, const Maybe& bias,
                     int64_t out_features, int64_t group_size, const Fused& fused, const Maybe& vocab_blocks) {
  check(x.dim() > 0, "x", "have a dimension of features");
  const bool lossless = group_size == 0;
  const ScalarType kind = weight.scalar_type();
  const bool bytes = kind == ScalarType::Char || kind == ScalarType::Float8_e4m3fn;
  if (lossless && kind != ScalarType::Byte && !bytes)  // (a matrix that would not become smaller)
    return dense(x, {weight}, bias ? Tensors{*bias} : Tensors{}, fused);
  check(!lossless || !vocab_blocks, "vocab_blocks", "be for matmuls with weights in 4 bits");
  LinearCall call = !lossless ? quantized(weight, scale_zero, columns_of(x), out_features, group_size)
                    : bytes   ? in_8_bits(x, weight, scale_zero, out_features)
                              : in_12_bits(x, weight, scale_zero, columns_of(x), out_features);
  const Rows added{{vector_of(bias, x, out_features, "bias")}, {0, int32_t(out_features)}, bias.has_value()};
  Tensors held;
  const Tensor y = describe(call, x, out_features, lossless ? kLargestGroup : group_size, added, fused, held);
  call.gemm.vocab_blocks = vocab_blocks_of(vocab_blocks, out_features, fused);
  call.run(lossless && rows_of(x) > few_rows(true, x.dim() == 3 ? x.size(1) : 1));
  return y;
}

inline Tensor dense(const Tensor& x, const Tensors& weights, const Tensors& biases, const Fused& fused) {
  check(x.dim() > 0, "x", "have a dimension of features");
  check(!weights.empty() && (biases.empty() || biases.size() == weights.size()), "weights",
        "be one or more, and biases none or as many");
  const int64_t k = columns_of(x);
  STD_TORCH_CHECK(k > 0, kNoFeatures);
  LinearCall call;
  Rows& rows = call.gemm.dense;
  rows = rows_of_many(weights, x, "weights", [&](const Tensor& w) { return w.dim() == 2 && w.size(1) == k; });
  const Rows bias = rows_of_many(biases, x, "biases", [&](const Tensor& b) { return b.dim() == 1; });
  for (int i = 0; i < bias.count; ++i)
    check(bias.first[i + 1] == rows.first[i + 1], "biases", "be as long as the weights have rows");
  call.gemm.x.format = x.scalar_type() == ScalarType::BFloat16 ? kernels().bfloat16 : kFloats;
  const bool half = x.scalar_type() != ScalarType::Float;
  Tensors held;
  const Tensor y = describe(call, x, rows.first[rows.count], kLargestGroup, bias, fused, held);
  const bool few = rows_of(x) <= few_rows(half, x.dim() == 3 ? x.size(1) : 1);
  if (few || any_rows(half))
    call.run(!few);
  else
    run_library(call, held.empty() ? x : torch::stable::contiguous(x), weights, biases);
  return y;
}

}  // namespace river
