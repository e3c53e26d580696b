// Operators that a step begins with: rows of the embedding, and the tables of a rotary embedding.
#pragma once

#include <atomic>
#include <cmath>
#include <cstring>

#include "operators/tensors.h"
#include "vectors/dtypes.h"

namespace river {

// Rows of a table [V, D]. An id that it lacks gets zeros, and `outside` becomes 1.
struct EmbedArgs {
  const int64_t* ids;
  const char* table;
  char* out;
  int32_t* outside;
  int64_t count, entries, bytes;  // of ids, of rows, of one row
};

inline void embed_rows(const void* args, int part, int parts) {
  const auto& a = *static_cast<const EmbedArgs*>(args);
  for (auto [i, end] = share_of(a.count, part, parts); i < end; ++i) {
    const int64_t id = a.ids[i];
    if (id >= 0 && id < a.entries) {
      std::memcpy(a.out + i * a.bytes, a.table + id * a.bytes, a.bytes);
    } else {
      std::memset(a.out + i * a.bytes, 0, a.bytes);
      std::atomic_ref(*a.outside).store(1, std::memory_order_relaxed);
    }
  }
}

// Returns int64s [..., T], adjacent; `held` keeps the copy that this may take, which a tape must not.
inline const int64_t* numbers_in(const Tensor& x, Tensors& held, const char* name) {
  check(x.is_cpu() && x.scalar_type() == ScalarType::Long && x.dim() < 8 && (x.is_contiguous() || !Tape::recording()),
        name, "be int64 in the CPU's memory, contiguous to be recorded");
  held.push_back(x.is_contiguous() ? x : torch::stable::contiguous(x));
  return static_cast<const int64_t*>(held.back().data_ptr());
}

inline Tensor empty_behind(const Tensor& x, int64_t columns, const Tensor& like) {
  std::vector<int64_t> sizes(x.dim() + 1, columns);
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  return empty(sizes.data(), x.dim() + 1, like);
}

inline Tensor embed(const Tensor& ids, const Tensor& table) {
  Tensors held;
  check(table.is_cpu() && table.dim() == 2 && table.is_contiguous(), "table", "be [V, D] in the CPU's memory");
  Tensor out = empty_behind(ids, columns_of(table), table);
  if (out.numel() == 0) return out;
  EmbedArgs a{numbers_in(ids, held, "ids"), static_cast<char*>(table.data_ptr()), static_cast<char*>(out.data_ptr())};
  a.outside = reinterpret_cast<int32_t*>(workspace(sizeof(int32_t)));
  *a.outside = 0;
  a.count = ids.numel();
  a.entries = table.size(0);
  a.bytes = columns_of(table) * table.element_size();
  run_phases(a, {{embed_rows, &a, parts_of(a.count * a.bytes, 1 << 16)}}, a.count > kFewPositions);
  expect_zero(a.outside, "a token's id is no row of the embedding");
  return out;
}

// cos or sin of position times frequency, times a scale: [P, 2 F], the second half as the first, or `once` [P, F].
struct TurnArgs {
  const int64_t* positions;
  const void* frequencies;
  void* out;
  int64_t count;
  int32_t half, dtype, given;  // dtypes of the result and of the frequencies
  float scale;
  bool sine, once;
};

inline void make_turns(const void* args, int part, int parts) {
  const auto& a = *static_cast<const TurnArgs*>(args);
  float values[kMostHeadFeatures], frequencies[kMostHeadFeatures / 2];
  load_values(a.frequencies, 0, a.half, a.given, frequencies);
  const int columns = a.once ? a.half : 2 * a.half;
  for (auto [i, end] = share_of(a.count, part, parts); i < end; ++i) {
    for (int j = 0; j < a.half; ++j) {
      const float angle = float(a.positions[i]) * frequencies[j];
      values[j] = values[j + a.half] = (a.sine ? std::sin(angle) : std::cos(angle)) * a.scale;
    }
    store_values(a.out, i * columns, columns, a.dtype, values);
  }
}

inline Tensor turns(const Tensor& positions, const Tensor& frequencies, double scale, bool sine, const Tensor& like,
                    bool once) {
  Tensors held;
  const int64_t half = frequencies.numel();
  check(frequencies.is_cpu() && frequencies.dim() == 1 && frequencies.is_contiguous() && 2 * half <= kMostHeadFeatures,
        "frequencies", "be one row in the CPU's memory, for half of a head's features at most");
  Tensor out = empty_behind(positions, once ? half : 2 * half, like);
  if (out.numel() == 0) return out;
  TurnArgs a{numbers_in(positions, held, "positions"), frequencies.data_ptr(), out.data_ptr()};
  a.count = positions.numel();
  a.half = int32_t(half);
  a.dtype = dtype_of(like, "like");
  a.given = dtype_of(frequencies, "frequencies");
  a.scale = float(scale);
  a.sine = sine;
  a.once = once;
  run_phases(a, {{make_turns, &a, parts_of(a.count * half, 1 << 10)}}, a.count > kFewPositions);
  return out;
}

}  // namespace river
