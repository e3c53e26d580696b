// The library of one instruction set: its table of phases.
#include "activations.h"
#include "attention.h"
#include "choices.h"
#include "exit_scores.h"
#include "gemm.h"
#include "gemm_library.h"
#include "kv_fill.h"
#include "prompt_attention.h"
#include "rescore.h"

extern "C" __attribute__((visibility("default"))) const river::Kernels* river_kernels() {
  static constexpr river::Kernels kernels{
      .prepare = river::prepare,
      .gemm = river::gemm,
      .gemm_epilogue = river::gemm_epilogue,
      .kv_fill = river::kv_fill,
      .attend = river::attend,
      .combine = river::combine,
      .attend_prompt = river::attend_prompt,
      .rescore = river::rescore,
      .exit_score = river::exit_score,
      .weigh = river::weigh,
      .choose = river::choose,
      .bfloat16 = river::kBFloat16Format,
      .vectors = river::kHasVectors,
  };
  return &kernels;
}
