// Operators around the key-value cache: from tensors to phases.
#pragma once

#include "operators/tensors.h"

namespace river {

inline Cache cache_of(const Tensor& k_cache, const Tensor& v_cache) {
  bool same = k_cache.dim() == 4 && v_cache.dim() == 4 && k_cache.is_cpu() && v_cache.is_cpu() &&
              k_cache.scalar_type() == v_cache.scalar_type() && k_cache.stride(3) == 1;
  for (int i = 0; same && i < 4; ++i)
    same = k_cache.size(i) == v_cache.size(i) && k_cache.stride(i) == v_cache.stride(i);
  STD_TORCH_CHECK(same, "k_cache and v_cache must have one shape, stride and dtype [B, J, S, D], features adjacent");
  STD_TORCH_CHECK(k_cache.size(3) <= kMostHeadFeatures, "a head has more than ", kMostHeadFeatures, " features");
  return {static_cast<char*>(k_cache.data_ptr()), static_cast<char*>(v_cache.data_ptr()), k_cache.stride(0),
          k_cache.stride(1), k_cache.stride(2)};
}

// Describes the tables of a rotation, which hold a row for each position, of all sequences or of each.
inline void describe_rotation(KvFillArgs& a, const Tensor& cos, const Tensor& sin, bool half_tables, Tensors& held) {
  const int64_t turned = columns_of(cos) * (half_tables ? 2 : 1);
  check(cos.scalar_type() == sin.scalar_type() && turned <= a.head_dim && turned % 2 == 0 &&
            columns_of(sin) == columns_of(cos) && rows_of(sin) == rows_of(cos),
        "cos and sin", "have one shape and dtype and an even number of features, at most the head's");
  const int64_t rows = rows_of(cos);
  check(rows == a.positions || rows == int64_t(a.batch) * a.positions, "cos and sin",
        "have one row for each position, of all sequences or of each");
  const Strided table = rows_in(cos, held, "cos");
  a.cos = table.data;
  a.sin = rows_in(sin, held, "sin").data;
  a.rotary_position = table.stride;
  a.rotary_sequence = rows == a.positions ? 0 : a.positions * table.stride;
  a.rotary_dtype = dtype_of(cos, "cos");
  a.rotary_dim = int32_t(turned);
  a.half_tables = half_tables;
}

inline Tensor kv_fill(const Tensor& qkv, const Maybe& q_norm, const Maybe& k_norm, const Maybe& cos, const Maybe& sin,
                      const Tensor& slot, Tensor k_cache, Tensor v_cache, const std::string& norm, double eps,
                      bool interleaved, bool half_tables) {
  Tensors held;
  KvFillArgs a{};
  a.cache = cache_of(k_cache, v_cache);
  a.dtype = dtype_of(qkv, "qkv");
  a.batch = int32_t(k_cache.size(0));
  a.positions = int32_t(slot.numel());
  a.kv_heads = int32_t(k_cache.size(1));
  a.slots = int32_t(k_cache.size(2));
  a.head_dim = int32_t(k_cache.size(3));
  STD_TORCH_CHECK(a.kv_heads > 0 && a.head_dim > 0, "k_cache and v_cache must have heads with features");
  a.heads = int32_t(columns_of(qkv) / a.head_dim - 2 * a.kv_heads);
  check(qkv.numel() == int64_t(a.batch) * a.positions * (a.heads + 2 * a.kv_heads) * a.head_dim && a.heads > 0 &&
            qkv.scalar_type() == k_cache.scalar_type(),
        "qkv", "be a position of q|k|v for each slot, for the caches, in their dtype");
  a.qkv = rows_in(qkv, held, "qkv");
  a.norm = norm_of(norm);
  check((a.norm == kNoNorm) == !q_norm && !q_norm == !k_norm && a.norm != kLayerNorm, "q_norm and k_norm",
        "be given where there is a norm, which is rms or rms_plus_one");
  a.q_norm = vector_of(q_norm, qkv, a.head_dim, "q_norm");
  a.k_norm = vector_of(k_norm, qkv, a.head_dim, "k_norm");
  a.eps = float(eps);
  check(!cos == !sin, "cos and sin", "go together");
  if (cos) describe_rotation(a, *cos, *sin, half_tables, held);
  const bool wide = slot.scalar_type() == ScalarType::Long;
  check(slot.is_cpu() && slot.is_contiguous() && (wide || slot.scalar_type() == ScalarType::Int), "slot",
        "be int64 or int32 in the CPU's memory, one for each position");
  a.slot = slot.data_ptr();
  a.slot_bytes = wide ? 8 : 4;
  const int64_t sizes[] = {a.batch, a.positions, a.heads, a.head_dim}, one[] = {a.batch, a.heads, a.head_dim};
  Tensor q = a.positions == 1 ? empty(one, 3, qkv) : empty(sizes, 4, qkv);
  if (q.numel() == 0) return q;
  a.q = q.data_ptr();
  a.interleaved = interleaved;
  run_phases(a, {{kernels().kv_fill, &a, parts_of(qkv.numel(), 1 << 14)}}, a.positions > kFewPositions);
  return q;
}

// Describes attention of `positions` queries of each sequence, but for the mask.
inline void describe_attention(AttentionArgs& a, const Tensor& q, int64_t positions, const Tensor& k_cache,
                               const Tensor& v_cache, double scale, double softcap) {
  a.cache = cache_of(k_cache, v_cache);
  a.dtype = dtype_of(q, "q");
  a.batch = int32_t(k_cache.size(0));
  a.positions = int32_t(positions);
  a.heads = int32_t(q.size(q.dim() - 2));
  a.kv_heads = int32_t(k_cache.size(1));
  a.head_dim = int32_t(k_cache.size(3));
  a.slots = int32_t(k_cache.size(2));
  a.chunks = int32_t(ceil_div(a.slots, kChunk));
  a.scale = float(scale);
  a.softcap = float(softcap);
  const bool shares = a.kv_heads ? a.heads % a.kv_heads == 0 : a.heads == 0;
  check(q.size(0) == a.batch && columns_of(q) == a.head_dim && shares && q.scalar_type() == k_cache.scalar_type(), "q",
        "have the sequences, features and dtype of the caches, and a multiple of their heads");
}

inline void describe_mask(AttentionArgs& a, const Tensor& mask, int64_t sequence, int64_t position) {
  check(mask.is_cpu() && mask.size(mask.dim() - 1) == a.slots && mask.stride(mask.dim() - 1) == 1, "mask",
        "have a number for each slot, adjacent");
  a.mask = mask.data_ptr();
  a.mask_sequence = sequence;
  a.mask_position = position;
  a.mask_dtype = mask.scalar_type() == ScalarType::Bool ? kBool : dtype_of(mask, "mask");
}

inline void describe_sinks(AttentionArgs& a, const Maybe& sinks) {
  if (!sinks) return;
  check(sinks->is_cpu() && sinks->is_contiguous() && sinks->numel() == a.heads, "sinks",
        "have a number for each query head, adjacent, in the CPU's memory");
  a.sinks = sinks->data_ptr();
  a.sinks_dtype = dtype_of(*sinks, "sinks");
}

inline void run_few(AttentionArgs& a) {
  const int64_t partials = int64_t(a.batch) * a.positions * a.heads * a.chunks;
  const int64_t alone = a.batch * a.kv_heads * a.chunks;             // units of one group
  const int most = alone > 1 ? a.positions : (a.positions + 1) / 2;  // (two threads have work)
  a.together = std::clamp(kQueries / (a.heads / a.kv_heads), 1, most);
  if (a.chunks > 1) a.partial = reinterpret_cast<float*>(workspace(partials * (a.head_dim + 2) * sizeof(float)));
  const int64_t units = alone * ceil_div(a.positions, a.together);
  const Phase attend{kernels().attend, &a, int(std::min<int64_t>(units, 4 * threads()))};
  if (a.chunks == 1)
    run_phases(a, {attend});
  else
    run_phases(a, {attend, {kernels().combine, &a, parts_of(partials * a.head_dim, 1 << 14)}});
}

inline void run_many(const AttentionArgs& of) {
  PromptArgs a = prompt_of(of);
  const int parts = int(std::min<int64_t>(a.units, threads()));
  char* memory = workspace(parts * a.scratch_bytes + 64);
  a.taken = reinterpret_cast<uint64_t*>(memory);
  *a.taken = 0;
  a.scratch = memory + 64;
  run_phases(a, {{kernels().attend_prompt, &a, parts}}, true);
}

inline Tensor run_attention(AttentionArgs& a, const Tensor& q) {
  check(q.is_contiguous() || !Tape::recording(), "q", "be contiguous to be recorded");
  const Tensor query = q.is_contiguous() ? q : torch::stable::contiguous(q);
  Tensor out = empty_rows(q, a.head_dim);
  if (out.numel() == 0) return out;
  a.q = query.data_ptr();
  a.out = out.data_ptr();
  a.positions > kFewPositions ? run_many(a) : run_few(a);
  return out;
}

inline Tensor decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Maybe& mask,
                               double scale, double softcap, const Maybe& sinks) {
  AttentionArgs a{};
  check(q.dim() == 3, "q", "be [B, H, D]");
  describe_attention(a, q, 1, k_cache, v_cache, scale, softcap);
  describe_sinks(a, sinks);
  if (mask) {
    check(mask->dim() == 2 && mask->size(0) == a.batch, "mask", "be [B, S]");
    describe_mask(a, *mask, mask->stride(0), 0);
  }
  return run_attention(a, q);
}

inline Tensor attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Maybe& mask, double scale,
                        double softcap, bool causal, const Maybe& sinks) {
  AttentionArgs a{};
  check(q.dim() == 4, "q", "be [B, T, H, D]");
  describe_attention(a, q, q.size(1), k_cache, v_cache, scale, softcap);
  describe_sinks(a, sinks);
  a.causal = causal;
  if (mask) {
    const bool each = mask->dim() == 4 && mask->size(0) == a.batch;
    check((each || (mask->dim() == 4 && mask->size(0) == 1)) && mask->size(1) == 1 && mask->size(2) == a.positions,
          "mask", "be [B or 1, 1, T, S]");
    describe_mask(a, *mask, each ? mask->stride(0) : 0, mask->stride(2));
  }
  check(!mask || !causal, "mask", "not be given beside causal");
  return run_attention(a, q);
}

}  // namespace river
