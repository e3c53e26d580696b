// The library of one instruction set: its table of phases.
#include "kernels/activations.h"
#include "kernels/attention.h"
#include "kernels/choices.h"
#include "kernels/exit_scores.h"
#include "kernels/experts.h"
#include "kernels/gemm_library.h"
#include "kernels/kv_fill.h"
#include "kernels/prompt_attention.h"
#include "kernels/rescore.h"

namespace river {

void gemm(const void* args, int part, int parts);   // gemm.cpp
extern const int32_t kBFloat16Format, kRowsFormat;  // gemm.cpp

namespace {

const Kernels kKernels{
    .prepare = prepare,
    .gemm = gemm,
    .gemm_epilogue = gemm_epilogue,
    .kv_fill = kv_fill,
    .attend = attend,
    .combine = combine,
    .attend_prompt = attend_prompt,
    .rescore = rescore,
    .exit_score = exit_score,
    .weigh = weigh,
    .choose = choose,
    .sort = sort,
    .combine_experts = combine_experts,
    .route = route,
    .bfloat16 = kBFloat16Format,
    .rows_of_bfloat16 = kRowsFormat,
    .vectors = kHasVectors,
};

}  // namespace
}  // namespace river

extern "C" __attribute__((visibility("default"))) const river::Kernels* river_kernels() { return &river::kKernels; }
