// The choice of a matmul's kernel, by the format of its activations and by rows. Matmuls take more than half of a
// library's time to compile, so they are compiled at the same time as kernels.cpp, which has the table of phases.
#include <climits>
#include <cstring>

#include "kernels/gemm_f32.h"
#include "kernels/gemv_int4.h"

#if defined(RIVER_ISA_AMX)
#include "kernels/gemm_amx.h"
#elif defined(RIVER_ISA_AVX512_BF16) || defined(RIVER_ISA_NEON_I8MM)
#include "kernels/gemm_bf16_dot.h"
#endif

namespace river {

struct GemmChoice {
  int32_t format, most_rows;
  void (*run)(const GemmArgs& a, int part, int parts);
};

// The first that fits is taken.
constexpr GemmChoice kGemms[] = {
    {kInt8, INT_MAX, gemv_int4},
    {kFloats, INT_MAX, gemm_f32},
#if defined(RIVER_ISA_AMX)
    {kAmxTiles, kBlock, gemm_amx},
    {kAmxTiles, INT_MAX, gemm_amx_multi},
#elif defined(RIVER_ISA_AVX512_BF16) || defined(RIVER_ISA_NEON_I8MM)
    {kBFloat16Rows, INT_MAX, gemm_bf16_dot},
#else
    {kEvenOdd, INT_MAX, gemm_f32},
#endif
};
extern const int32_t kBFloat16Format = kGemms[2].format;  // kernels.cpp declares it, and `gemm`

inline void gemm_of(const GemmArgs& a, int part, int parts) {
  const GemmChoice* choice = kGemms;
  while (a.x.format != choice->format || a.rows > choice->most_rows) ++choice;
  choice->run(a, part, parts);
}

inline char* row_of(const Epilogue& e, int row) {
  return static_cast<char*>(e.y.data) + row * e.y.stride * bytes_of(e.dtype);
}

// `count` rows from `row` on, which meet expert number `chosen`.
inline GemmArgs rows_of_expert(const GemmArgs& all, int row, int count, int64_t chosen) {
  GemmArgs a = all;
  const int64_t groups = a.groups(), blocks = ceil_div(a.epilogue.out_features, kBlock);
  a.x.values = static_cast<int8_t*>(a.x.values) + row * a.padded_features();
  a.x.scale += row * groups;
  a.x.sum += row * groups;
  a.x.start += row * groups;
  a.weight += chosen * blocks * a.padded_features() * kBlock / 2;
  a.scale_zero += chosen * blocks * groups * kBlock * 2;
  a.epilogue.y.data = row_of(a.epilogue, row);
  a.rows = count;
  return a;
}

// Neighbors that chose the same expert share what is read of its weight.
inline void moe_gemm(const GemmArgs& a, int part, int parts) {
  for (int row = 0, end; row < a.rows; row = end) {
    const int64_t chosen = a.expert[row];
    for (end = row + 1; end < a.rows && a.expert[end] == chosen;) ++end;
    if (chosen >= 0 && chosen < a.experts)
      gemm_of(rows_of_expert(a, row, end - row, chosen), part, parts);
    else
      for (int r = row; part == 0 && r < end; ++r)
        std::memset(row_of(a.epilogue, r), 0, a.epilogue.out_features * bytes_of(a.epilogue.dtype));
  }
}

void gemm(const void* args, int part, int parts) {
  const auto& a = *static_cast<const GemmArgs*>(args);
  return a.expert ? moe_gemm(a, part, parts) : gemm_of(a, part, parts);
}

}  // namespace river
