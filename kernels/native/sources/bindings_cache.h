// Operators around the key-value cache: from tensors to phases.
#pragma once

#include "bindings_kernels.h"
#include "tensors.h"

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

// Returns the rows of a table of `batch` rows or one.
inline Strided table_of(const Tensor& x, int64_t batch, std::vector<Tensor>& held, const char* name) {
  Strided rows = rows_in(x, held, name);
  const int64_t count = rows_of(x);
  check(count == 1 || count == batch, name, "have one row, or one for each sequence");
  if (count == 1) rows.stride = 0;
  return rows;
}

inline Tensor kv_fill(const Tensor& qkv, const Maybe& q_norm, const Maybe& k_norm, const Maybe& cos, const Maybe& sin,
                      const Tensor& slot, Tensor k_cache, Tensor v_cache, const std::string& norm, double eps,
                      bool interleaved) {
  std::vector<Tensor> held;
  KvFillArgs a{};
  a.cache = cache_of(k_cache, v_cache);
  const int64_t batch = k_cache.size(0), kv_heads = k_cache.size(1), dim = k_cache.size(3);
  const int64_t heads = columns_of(qkv) / dim - 2 * kv_heads;
  check(qkv.numel() == batch * (heads + 2 * kv_heads) * dim && heads > 0 && qkv.scalar_type() == k_cache.scalar_type(),
        "qkv", "be one position of q|k|v for the caches, in their dtype");
  a.dtype = dtype_of(qkv, "qkv");
  const Strided in = rows_in(qkv, held, "qkv");
  a.qkv = in.data;
  a.qkv_stride = in.stride;
  a.norm = norm_of(norm);
  check((a.norm == kNoNorm) == !q_norm && !q_norm == !k_norm && a.norm != kLayerNorm, "q_norm and k_norm",
        "be given where there is a norm, which is rms or rms_plus_one");
  a.q_norm = vector_of(q_norm, qkv, dim, "q_norm");
  a.k_norm = vector_of(k_norm, qkv, dim, "k_norm");
  a.eps = float(eps);
  check(!cos == !sin, "cos and sin", "go together");
  if (cos) {
    check(cos->scalar_type() == sin->scalar_type() && columns_of(*cos) <= dim && columns_of(*cos) % 2 == 0 &&
              columns_of(*sin) == columns_of(*cos) && rows_of(*sin) == rows_of(*cos),
          "cos and sin", "have one shape and dtype and an even number of features, at most the head's");
    const Strided table = table_of(*cos, batch, held, "cos");
    a.cos = table.data;
    a.sin = table_of(*sin, batch, held, "sin").data;
    a.rotary_stride = table.stride;
    a.rotary_dtype = dtype_of(*cos, "cos");
    a.rotary_dim = int32_t(columns_of(*cos));
  }
  const bool wide = slot.scalar_type() == ScalarType::Long;
  check(slot.is_cpu() && slot.numel() == 1 && (wide || slot.scalar_type() == ScalarType::Int), "slot",
        "be one int64 or int32 in the CPU's memory");
  a.slot = slot.data_ptr();
  a.slot_bytes = wide ? 8 : 4;
  const int64_t sizes[] = {batch, heads, dim};
  Tensor q = empty(sizes, 3, qkv);
  a.q = q.data_ptr();
  a.batch = int32_t(batch);
  a.heads = int32_t(heads);
  a.kv_heads = int32_t(kv_heads);
  a.head_dim = int32_t(dim);
  a.slots = int32_t(k_cache.size(2));
  a.interleaved = interleaved;
  const int most = threads();
  Call<KvFillArgs>(a).run({{kernels().kv_fill, parts_of(qkv.numel(), 1 << 14, most)}}, most);
  return q;
}

inline Tensor decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Maybe& mask,
                               double scale, double softcap) {
  std::vector<Tensor> held;
  AttentionArgs a{};
  a.cache = cache_of(k_cache, v_cache);
  const int64_t batch = k_cache.size(0), kv_heads = k_cache.size(1), slots = k_cache.size(2), dim = k_cache.size(3);
  check(q.dim() == 3 && q.size(0) == batch && q.size(2) == dim && q.size(1) % kv_heads == 0 &&
            q.scalar_type() == k_cache.scalar_type(),
        "q", "be [B, H, D] for the caches, in their dtype");
  const Tensor query = q.is_contiguous() ? q : torch::stable::contiguous(q);
  check(q.is_contiguous() || !Tape::recording(), "q", "be contiguous to be recorded");
  a.q = query.data_ptr();
  a.dtype = dtype_of(q, "q");
  if (mask) {
    check(mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == slots && mask->stride(1) == 1 &&
              mask->is_cpu(),
          "mask", "be [B, S] with adjacent slots");
    a.mask = mask->data_ptr();
    a.mask_stride = mask->stride(0);
    a.mask_dtype = mask->scalar_type() == ScalarType::Bool ? kBool : dtype_of(*mask, "mask");
  }
  const int64_t sizes[] = {batch, q.size(1), dim};
  Tensor out = empty(sizes, 3, q);
  a.out = out.data_ptr();
  a.batch = int32_t(batch);
  a.heads = int32_t(q.size(1));
  a.kv_heads = int32_t(kv_heads);
  a.head_dim = int32_t(dim);
  a.slots = int32_t(slots);
  a.chunks = int32_t((slots + kChunk - 1) / kChunk);
  a.scale = float(scale);
  a.softcap = float(softcap);
  if (a.chunks > 1)
    a.partial = reinterpret_cast<float*>(workspace(size_t(batch) * a.heads * a.chunks * (dim + 2) * sizeof(float)));
  const int most = threads();
  const int parts = int(std::min<int64_t>(batch * kv_heads * a.chunks, 4 * most));
  const Call<AttentionArgs> call(a);
  if (a.chunks == 1)
    call.run({{kernels().attend, parts}}, most);
  else
    call.run({{kernels().attend, parts}, {kernels().combine, parts_of(int64_t(a.heads) * a.chunks * dim, 1 << 14, most)}},
             most);
  return out;
}

inline void shift(Tensor cache) {
  check(cache.is_cpu() && cache.dim() == 4 && cache.stride(3) == 1 && cache.stride(2) == cache.size(3), "cache",
        "be [B, J, S, D] in the CPU's memory, slots adjacent");
  const int64_t size = cache.element_size();
  ShiftArgs a{static_cast<char*>(cache.data_ptr()), cache.stride(0) * size, cache.stride(1) * size,
              cache.stride(2) * size};
  a.batch = int32_t(cache.size(0));
  a.heads = int32_t(cache.size(1));
  a.slots = int32_t(cache.size(2));
  const int most = threads();
  if (cache.numel() > 0) Call<ShiftArgs>(a).run({{kernels().shift, parts_of(cache.numel(), 1 << 16, most)}}, most);
}

}  // namespace river
