// The library of phases that the operators use, chosen by the address of its table.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "phases.h"

namespace river {

inline std::atomic<const Kernels*> chosen{nullptr};

inline void use_kernels(int64_t address) { chosen = reinterpret_cast<const Kernels*>(address); }

inline const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  STD_TORCH_CHECK(table, "no library of kernels was chosen; call river_compile.kernels.native.load()");
  return *table;
}

}  // namespace river
