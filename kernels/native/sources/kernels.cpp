// The library of one instruction set: its table of phases.
#include "attention.h"
#include "entropy.h"
#include "finish.h"
#include "kv_fill.h"
#include "linear.h"
#include "phases.h"
#include "plumbing.h"
#include "prepare.h"
#include "prompt_attention.h"
#include "rescore.h"
#include "tiles.h"

#define RIVER_NAME(x) RIVER_QUOTE(x)
#define RIVER_QUOTE(x) #x

extern "C" __attribute__((visibility("default"))) const river::Kernels* river_kernels() {
  static const river::Kernels kernels = {RIVER_NAME(RIVER_ISA), river::prepare, river::linear,  river::kv_fill,
                                         river::attend,         river::combine, river::count,   river::copy,
                                         river::score,          river::finish,  river::shift,   river::kOfBfloat16,
                                         river::rescore,        river::weigh,   river::entropy, river::attend_prompt,
                                         river::kHasVectors};
  return &kernels;
}
