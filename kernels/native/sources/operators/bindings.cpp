// The operators torch.ops.river_native.*, from tensors to phases, written against torch's stable ABI.
#include <torch/csrc/stable/library.h>

#include "operators/bindings_cache.h"
#include "operators/bindings_experts.h"
#include "operators/bindings_inputs.h"
#include "operators/bindings_linear.h"
#include "operators/bindings_logits.h"
#include "operators/tape.h"
#include "operators/tape_clock.h"

namespace river {
namespace {

void check_count(const Tensor& x, const char* name) {
  check(x.is_cpu() && x.scalar_type() == ScalarType::Long && x.is_contiguous() && x.numel() > 0, name,
        "be int64 in the CPU's memory, adjacent");
}

// out = a + b + by, int64s; a and b hold one, or as many as out, and b may be null.
struct CountArgs {
  const int64_t *a, *b;
  int64_t* out;
  int64_t by, count;
  bool one_a, one_b;
};

void count(const void* args, int, int) {
  const auto& a = *static_cast<const CountArgs*>(args);
  for (int64_t i = 0; i < a.count; ++i) a.out[i] = a.a[a.one_a ? 0 : i] + (a.b ? a.b[a.one_b ? 0 : i] : 0) + a.by;
}

void count_into(const Tensor& a, const Maybe& b, int64_t by, const Tensor& out) {
  const auto numbers = [](const Tensor& x) { return static_cast<int64_t*>(x.data_ptr()); };
  const CountArgs args{numbers(a),     b ? numbers(*b) : nullptr, numbers(out), by, out.numel(),
                       a.numel() == 1, b && b->numel() == 1};
  run_phases(args, {{count, &args, 1}});
}

Tensor exit_score(const Tensor& hidden, const Tensor& previous) {
  Tensors held;
  check(hidden.dim() > 0 && has_rows(previous, hidden, columns_of(hidden)), "previous",
        "have hidden's dtype and shape");
  check(hidden.numel() > 0, "hidden", "not be empty");
  Tensor score = empty(nullptr, 0, aoti_torch_dtype_float32());
  ScoreArgs args{rows_in(hidden, held, "hidden"), rows_in(previous, held, "previous")};
  args.score = static_cast<float*>(score.data_ptr());
  args.dtype = dtype_of(hidden, "hidden");
  args.rows = int32_t(rows_of(hidden));
  args.features = int32_t(columns_of(hidden));
  run_phases(args, {{kernels().exit_score, &args, 1}});
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

struct CopyArgs {
  const void* from;
  void* to;
  int64_t bytes;
};

void copy(const void* args, int, int) {
  const auto& a = *static_cast<const CopyArgs*>(args);
  std::memcpy(a.to, a.from, a.bytes);
}

void copy_to(const Tensor& from, Tensor to) {
  check(from.is_cpu() && to.is_cpu() && from.is_contiguous() && to.is_contiguous() &&
            from.scalar_type() == to.scalar_type() && from.numel() == to.numel(),
        "a copy's tensors", "be contiguous, of one dtype and size");
  if (from.numel() == 0) return;
  const CopyArgs args{from.data_ptr(), to.data_ptr(), int64_t(from.numel() * from.element_size())};
  run_phases(args, {{copy, &args, 1}});
}

void use_cores(int64_t all, int64_t fast) {
  fast_cores.store(int(fast));
  all_cores.store(int(all));
}

int64_t used_threads() { return threads(); }

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
Tensor replay_timed(int64_t tape) { return replay_timed(*tape_at(tape)); }
void drop(int64_t tape) { delete tape_at(tape); }
int64_t tape_phases(int64_t tape) { return int64_t(tape_at(tape)->recorded().size()); }
int64_t tape_bytes(int64_t tape) { return int64_t(tape_at(tape)->bytes()); }

// Takes arguments off torch's stack, in the schema's order: a `Fused` is several.
struct Stack {
  StableIValue* next;

  template <class T>
  T take() {
    if constexpr (std::is_same_v<T, NormOf>)
      return {take<std::string>(), take<Maybe>(), take<Maybe>(), take<double>()};
    else if constexpr (std::is_same_v<T, Fused>)
      return {take<Maybe>(), take<NormOf>(), take<std::string>(), take<bool>()};
    else
      return torch::stable::detail::to<T>(*next++);
  }
};

// Puts results on torch's stack.
template <class Result>
void put(StableIValue* stack, const Result& result) {
  stack[0] = torch::stable::detail::from(result);
}
template <class First, class Second>
void put(StableIValue* stack, const std::tuple<First, Second>& results) {
  stack[0] = torch::stable::detail::from(std::get<0>(results));
  stack[1] = torch::stable::detail::from(std::get<1>(results));
}

template <class Result, class... Args>
void run(Result (*f)(Args...), StableIValue* stack, uint64_t given) {
  Stack arguments{stack};
  const std::tuple<std::decay_t<Args>...> taken{arguments.take<std::decay_t<Args>>()...};
  STD_TORCH_CHECK(arguments.next == stack + given, "an operator's schema is not that of its function");
  if constexpr (std::is_void_v<Result>)
    std::apply(f, taken);
  else
    put(stack, std::apply(f, taken));
}

// TORCH_BOX, for arguments that are several of the schema's.
template <auto f>
void boxed(StableIValue* stack, uint64_t given, uint64_t) {
  run(f, stack, given);
}

struct Operator {
  std::string name, schema;
  void (*run)(StableIValue* stack, uint64_t given, uint64_t returned);
};

const std::string kNorm = "str norm='none', Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-06";
const std::string kFused = "Tensor? residual=None, " + kNorm + ", str activation='none', bool gated=False";
const std::string kAttention = "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? mask, float scale, float softcap";

const Operator kOnTensors[] = {
    {"linear",
     "(Tensor x, Tensor weight, Tensor scale_zero, Tensor? bias, int out_features, int group_size, " + kFused +
         ", Tensor? vocab_blocks=None) -> Tensor",
     boxed<linear>},
    {"dense", "(Tensor x, Tensor[] weights, Tensor[] biases, " + kFused + ") -> Tensor", boxed<dense>},
    {"experts",
     "(Tensor x, Tensor weight, Tensor? scale_zero, Tensor expert, int out_features, int group_size) -> Tensor",
     boxed<experts>},
    {"mixture",
     "(Tensor x, Tensor index, Tensor weight, Tensor up, Tensor? up_side, Tensor? up_bias, int up_group, Tensor down, "
     "Tensor? down_side, Tensor? down_bias, int down_group, int features, str activation, bool pairs, "
     "Tensor? residual=None) -> Tensor",
     boxed<mixture>},
    {"route", "(Tensor logits, int each, str routing, bool floats) -> (Tensor, Tensor)", boxed<route>},
    {"embed", "(Tensor ids, Tensor table) -> Tensor", boxed<embed>},
    {"turns", "(Tensor positions, Tensor frequencies, float scale, bool sine, Tensor like, bool once=False) -> Tensor",
     boxed<turns>},
    {"norm", "(Tensor x, " + kNorm + ", Tensor? residual=None) -> Tensor", boxed<norm>},
    {"rescore", "(Tensor logits, Tensor x, Tensor weight, Tensor? bias, " + kNorm + ") -> Tensor", boxed<rescore>},
    {"kv_fill",
     "(Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor? cos, Tensor? sin, Tensor slot, Tensor(a!) k_cache, "
     "Tensor(b!) v_cache, str norm, float eps, bool interleaved, bool half_tables=False) -> Tensor",
     boxed<kv_fill>},
    {"decode_attention", kAttention + ", Tensor? sinks=None) -> Tensor", boxed<decode_attention>},
    {"attention", kAttention + ", bool causal, Tensor? sinks=None) -> Tensor", boxed<attention>},
    {"exit_score", "(Tensor hidden, Tensor previous) -> Tensor", boxed<exit_score>},
    {"largest_entropy", "(Tensor logits) -> Tensor", boxed<largest_entropy>},
    {"choices", "(Tensor logits, bool entropies) -> Tensor", boxed<choices>},
    {"add", "(Tensor a, Tensor b) -> Tensor", boxed<add>},
    {"advance", "(Tensor(a!) counter, int by) -> ()", boxed<advance>},
    {"copy", "(Tensor from_, Tensor(a!) to) -> ()", boxed<copy_to>},
};
const Operator kOnNumbers[] = {
    {"few_rows", "(bool half, int positions) -> int", boxed<few_rows>},
    {"record", "() -> int", boxed<record>},
    {"recorded", "() -> ()", boxed<recorded>},
    {"replay", "(int tape) -> ()", boxed<replay>},
    {"replay_timed", "(int tape) -> Tensor", boxed<static_cast<Tensor (*)(int64_t)>(replay_timed)>},
    {"drop", "(int tape) -> ()", boxed<drop>},
    {"tape_phases", "(int tape) -> int", boxed<tape_phases>},
    {"tape_bytes", "(int tape) -> int", boxed<tape_bytes>},
    {"use_kernels", "(int address) -> ()", boxed<use_kernels>},
    {"use_cores", "(int all, int fast) -> ()", boxed<use_cores>},
    {"threads", "() -> int", boxed<used_threads>},
};

}  // namespace
}  // namespace river

STABLE_TORCH_LIBRARY_FRAGMENT(river_native, m) {
  for (const auto& of : river::kOnTensors) m.def((of.name + of.schema).c_str());
  for (const auto& of : river::kOnNumbers) m.def((of.name + of.schema).c_str());
}
STABLE_TORCH_LIBRARY_IMPL(river_native, CPU, m) {
  for (const auto& of : river::kOnTensors) m.impl(of.name.c_str(), of.run);
}
STABLE_TORCH_LIBRARY_IMPL(river_native, CompositeExplicitAutograd, m) {
  for (const auto& of : river::kOnNumbers) m.impl(of.name.c_str(), of.run);
}
