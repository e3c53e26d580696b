// The operators torch.ops.river_native.*: from tensors to phases. Written against torch's stable ABI.
//
//   linear                        a product with 4-bit weights and what is fused with it
//   dense                         the same with weights in x's dtype
//   kv_fill, attention            positions of a static cache; decode_attention: one of each sequence
//   norm                          a norm, and a residual
//   rescore                       the largest logits computed anew
//   shift                         the entries of a full window moved up by one slot
//   few_rows                      of a product of 16-bit matrices that is computed here
//   exit_score, largest_entropy   the least cosine of rows, the largest entropy of rows of logits
//   add, advance, copy            counters, and tensors at the borders of what is recorded
//   record, recorded, replay, ... tapes, known by their address
//   use_kernels                   chooses the library of phases, by the address of its table
#include <torch/csrc/stable/library.h>

#include "bindings_cache.h"
#include "bindings_linear.h"
#include "bindings_rescore.h"
#include "tape.h"

namespace river {
namespace {

void check_count(const Tensor& x, const char* name) {
  check(x.is_cpu() && x.scalar_type() == ScalarType::Long && x.is_contiguous() && x.numel() > 0, name,
        "be int64 in the CPU's memory, adjacent");
}

void count_into(const Tensor& a, const Maybe& b, int64_t by, const Tensor& out) {
  const auto* other = b ? static_cast<const int64_t*>(b->data_ptr()) : nullptr;
  const CountArgs args{static_cast<const int64_t*>(a.data_ptr()),
                       other,
                       static_cast<int64_t*>(out.data_ptr()),
                       by,
                       out.numel(),
                       a.numel() == 1,
                       b && b->numel() == 1};
  Call<CountArgs>(args).run({{kernels().count, 1}}, 1);
}

Tensor exit_score(const Tensor& hidden, const Tensor& previous) {
  std::vector<Tensor> held;
  check(hidden.dim() > 0 && has_rows(previous, hidden, columns_of(hidden)), "previous",
        "have hidden's dtype and shape");
  const Strided x = rows_in(hidden, held, "hidden"), y = rows_in(previous, held, "previous");
  Tensor score = empty(nullptr, 0, aoti_torch_dtype_float32());
  const ScoreArgs args{x.data,
                       y.data,
                       x.stride,
                       y.stride,
                       static_cast<float*>(score.data_ptr()),
                       dtype_of(hidden, "hidden"),
                       int32_t(rows_of(hidden)),
                       int32_t(columns_of(hidden))};
  Call<ScoreArgs>(args).run({{kernels().score, 1}}, 1);
  return score;
}

Tensor add(const Tensor& a, const Tensor& b) {
  check_count(a, "a");
  check_count(b, "b");
  const bool one = a.numel() == 1 && b.numel() == 1;
  check(one || ((a.numel() == 1 || b.numel() == 1) && a.dim() <= 1 && b.dim() <= 1), "a and b",
        "be one number, or a vector and one number");
  const int64_t ones[] = {1, 1, 1, 1, 1, 1, 1, 1}, vector[] = {std::max(a.numel(), b.numel())};
  Tensor out = one ? empty(ones, std::max(a.dim(), b.dim()), a) : empty(vector, 1, a);
  count_into(a, b, 0, out);
  return out;
}

void advance(Tensor counter, int64_t by) {
  check_count(counter, "counter");
  check(counter.numel() == 1, "counter", "be one number");
  count_into(counter, std::nullopt, by, counter);
}

void copy_to(const Tensor& from, Tensor to) {
  check(from.is_cpu() && to.is_cpu() && from.is_contiguous() && to.is_contiguous() &&
            from.scalar_type() == to.scalar_type() && from.numel() == to.numel(),
        "a copy's tensors", "be contiguous, of one dtype and size");
  const int64_t bytes = from.numel() * from.element_size();
  Call<CopyArgs>({from.data_ptr(), to.data_ptr(), bytes}).run({{kernels().copy, 1}}, 1);
}

Tape* tape_at(int64_t address) {
  STD_TORCH_CHECK(address, "nothing was recorded on this tape");
  return reinterpret_cast<Tape*>(address);
}

int64_t record() {
  STD_TORCH_CHECK(!Tape::recording(), "this thread records a tape already");
  Tape::recording() = new Tape;
  return reinterpret_cast<int64_t>(Tape::recording());
}

void recorded() { Tape::recording() = nullptr; }
void replay(int64_t tape) { tape_at(tape)->replay(threads()); }
void drop(int64_t tape) { delete tape_at(tape); }
int64_t few_rows_of(bool half, int64_t positions) { return few_rows(half, positions); }
int64_t tape_phases(int64_t tape) { return int64_t(tape_at(tape)->phases()); }
int64_t tape_bytes(int64_t tape) { return int64_t(tape_at(tape)->bytes()); }

}  // namespace
}  // namespace river

STABLE_TORCH_LIBRARY_FRAGMENT(river_native, m) {
  m.def(
      "linear(Tensor x, Tensor weight, Tensor scale_zero, Tensor? bias, int out_features, int group_size, "
      "Tensor? residual=None, str norm='none', Tensor? norm_weight=None, "
      "Tensor? norm_bias=None, float eps=1e-06, str activation='none', bool gated=False, Tensor? wanted=None) -> "
      "Tensor");
  m.def(
      "dense(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? residual=None, str norm='none', "
      "Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-06, str activation='none', bool gated=False) "
      "-> Tensor");
  m.def(
      "experts(Tensor x, Tensor weight, Tensor scale_zero, Tensor expert, int out_features, int group_size) "
      "-> Tensor");
  m.def("norm(Tensor x, str norm, Tensor weight, Tensor? bias, float eps, Tensor? residual) -> Tensor");
  m.def(
      "rescore(Tensor logits, Tensor x, Tensor weight, Tensor? bias, str norm, Tensor? norm_weight, Tensor? norm_bias, "
      "float eps) -> Tensor");
  m.def(
      "kv_fill(Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor? cos, Tensor? sin, Tensor slot, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, str norm, float eps, bool interleaved) -> Tensor");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? mask, float scale, float softcap) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? mask, float scale, float softcap, bool causal) "
      "-> Tensor");
  m.def("shift(Tensor(a!) cache) -> ()");
  m.def("exit_score(Tensor hidden, Tensor previous) -> Tensor");
  m.def("largest_entropy(Tensor logits) -> Tensor");
  m.def("add(Tensor a, Tensor b) -> Tensor");
  m.def("advance(Tensor(a!) counter, int by) -> ()");
  m.def("copy(Tensor from_, Tensor(a!) to) -> ()");
  m.def("few_rows(bool half, int positions) -> int");
  m.def("record() -> int");
  m.def("recorded() -> ()");
  m.def("replay(int tape) -> ()");
  m.def("drop(int tape) -> ()");
  m.def("tape_phases(int tape) -> int");
  m.def("tape_bytes(int tape) -> int");
  m.def("use_kernels(int address) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(river_native, CPU, m) {
  m.impl("linear", TORCH_BOX(&river::linear));
  m.impl("dense", TORCH_BOX(&river::dense));
  m.impl("experts", TORCH_BOX(&river::experts));
  m.impl("norm", TORCH_BOX(&river::norm));
  m.impl("rescore", TORCH_BOX(&river::rescore));
  m.impl("kv_fill", TORCH_BOX(&river::kv_fill));
  m.impl("decode_attention", TORCH_BOX(&river::decode_attention));
  m.impl("attention", TORCH_BOX(&river::attention));
  m.impl("shift", TORCH_BOX(&river::shift));
  m.impl("exit_score", TORCH_BOX(&river::exit_score));
  m.impl("largest_entropy", TORCH_BOX(&river::largest_entropy));
  m.impl("add", TORCH_BOX(&river::add));
  m.impl("advance", TORCH_BOX(&river::advance));
  m.impl("copy", TORCH_BOX(&river::copy_to));
}

STABLE_TORCH_LIBRARY_IMPL(river_native, CompositeExplicitAutograd, m) {
  m.impl("few_rows", TORCH_BOX(&river::few_rows_of));
  m.impl("record", TORCH_BOX(&river::record));
  m.impl("recorded", TORCH_BOX(&river::recorded));
  m.impl("replay", TORCH_BOX(&river::replay));
  m.impl("drop", TORCH_BOX(&river::drop));
  m.impl("tape_phases", TORCH_BOX(&river::tape_phases));
  m.impl("tape_bytes", TORCH_BOX(&river::tape_bytes));
  m.impl("use_kernels", TORCH_BOX(&river::use_kernels));
}
