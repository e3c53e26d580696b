// The choice of a matmul's kernel, by the format of its activations and by rows. Matmuls take more than half of a
// library's time to compile, so they are compiled at the same time as kernels.cpp, which has the table of phases.
#include <algorithm>
#include <climits>
#include <cstring>
#include <iterator>

#include "kernels/gemm_f32.h"
#include "kernels/gemv_int4.h"

#if defined(RIVER_ISA_AMX)
#include "kernels/gemm_amx.h"
#endif
#if defined(RIVER_ISA_AMX) || defined(RIVER_ISA_AVX512_BF16) || defined(RIVER_ISA_NEON_I8MM)
#include "kernels/gemm_bf16_dot.h"
#endif

namespace river {

struct GemmChoice {
  int32_t format, most_rows;
  void (*run)(const GemmArgs& a, int part, int parts);
};

// The first that fits is taken.
constexpr GemmChoice kGemms[] = {
    {kInt8, INT_MAX, gemv_int4},   {kFloats, INT_MAX, gemm_f32},
#if defined(RIVER_ISA_AMX)
    {kAmxTiles, kBlock, gemm_amx}, {kAmxTiles, INT_MAX, gemm_amx_multi}, {kBFloat16Rows, INT_MAX, gemm_bf16_dot},
#elif defined(RIVER_ISA_AVX512_BF16) || defined(RIVER_ISA_NEON_I8MM)
    {kBFloat16Rows, INT_MAX, gemm_bf16_dot},
#else
    {kEvenOdd, INT_MAX, gemm_f32},
#endif
};
extern const int32_t kBFloat16Format = kGemms[2].format;  // kernels.cpp declares both, and `gemm`
extern const int32_t kRowsFormat = std::end(kGemms)[-1].format;

inline void gemm_of(const GemmArgs& a, int part, int parts) {
  const GemmChoice* choice = kGemms;
  while (a.x.format != choice->format || a.rows > choice->most_rows) ++choice;
  choice->run(a, part, parts);
}

inline char* row_of(const Epilogue& e, int row) {
  return static_cast<char*>(e.y.data) + row * e.y.stride * bytes_of(e.dtype);
}

inline int64_t bytes_of_value(int32_t format) { return format == kInt8 ? 1 : format == kBFloat16Rows ? 2 : 4; }

// `count` rows from `row` on, which meet expert number `chosen`.
inline GemmArgs rows_of_expert(const GemmArgs& all, int row, int count, int64_t chosen) {
  GemmArgs a = all;
  Epilogue& e = a.epilogue;
  const int64_t groups = a.groups(), blocks = ceil_div(e.out_features, kBlock), features = e.out_features;
  a.x.values = static_cast<char*>(a.x.values) + row * a.padded_features() * bytes_of_value(a.x.format);
  if (a.exponents) {
    a.weight += chosen * features * (a.in_features / 2);
    a.exponents += chosen * features * (a.in_features / kMxGroup);
  } else if (a.dense.count) {
    const char* stack = static_cast<const char*>(a.dense.data[0]);
    a.dense.data[0] = stack + chosen * features * a.in_features * bytes_of(e.dtype);
  } else if (a.palette) {
    a.weight += chosen * blocks * (kBlock / kFour) * ceil_div(a.in_features, kUnit) * kUnitBytes;
    a.palette += chosen * a.side_each;
  } else {
    a.x.scale += row * groups;
    a.x.sum += row * groups;
    a.x.start += row * groups;
    a.weight += chosen * blocks * a.padded_features() * kBlock / 2;
    a.scale_zero += chosen * blocks * groups * kBlock * 2;
  }
  if (e.bias.count) e.bias.data[0] = static_cast<const char*>(e.bias.data[0]) + chosen * features * bytes_of(e.dtype);
  e.y.data = row_of(e, row);
  a.rows = count;
  return a;
}

// Calls f(first row, how many, their expert) for neighbors that chose the same.
template <class F>
void for_neighbors(const GemmArgs& a, const F& f) {
  for (int row = 0, end; row < a.rows; row = end) {
    const int64_t chosen = a.expert[row];
    for (end = row + 1; end < a.rows && a.expert[end] == chosen;) ++end;
    f(row, end - row, chosen >= 0 && chosen < a.experts ? chosen : -1);
  }
}

// Neighbors share what is read of their expert's weight. A part reads on in as few experts as it can, since the first
// rows of each are not fetched ahead: parts split the blocks of all experts, behind one another.
inline void moe_gemm(const GemmArgs& a, int part, int parts) {
  const int64_t blocks = a.epilogue.blocks();
  const auto cost_of = [](int count) { return ceil_div(int64_t(count), int64_t(4)); };  // of a block
  int64_t total = 0, before = 0;
  for_neighbors(a, [&](int, int count, int64_t chosen) { total += chosen < 0 ? 0 : blocks * cost_of(count); });
  const Share mine = share_of(total, part, parts);
  for_neighbors(a, [&](int row, int count, int64_t chosen) {
    if (chosen < 0) {
      for (int r = row; part == 0 && r < row + count; ++r)
        std::memset(row_of(a.epilogue, r), 0, a.epilogue.width() * bytes_of(a.epilogue.dtype));
      return;
    }
    const int64_t cost = cost_of(count);
    const auto block_at = [&](int64_t at) { return std::clamp(ceil_div(at - before, cost), int64_t(0), blocks); };
    const Share only{block_at(mine.first), block_at(mine.end)};
    before += blocks * cost;
    if (only.first == only.end) return;
    GemmArgs some = rows_of_expert(a, row, count, chosen);
    some.only = only;
    gemm_of(some, part, parts);
  });
}

void gemm(const void* args, int part, int parts) {
  const auto& a = *static_cast<const GemmArgs*>(args);
  return a.expert ? moe_gemm(a, part, parts) : gemm_of(a, part, parts);
}

}  // namespace river
