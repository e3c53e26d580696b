// The library of one instruction set: its table of phases.
#include "linear.h"
#include "phases.h"
#include "prepare.h"

#define RIVER_NAME(x) RIVER_QUOTE(x)
#define RIVER_QUOTE(x) #x

extern "C" __attribute__((visibility("default"))) const river::Kernels* river_kernels() {
  static const river::Kernels kernels = {RIVER_NAME(RIVER_ISA), river::prepare, river::linear};
  return &kernels;
}
