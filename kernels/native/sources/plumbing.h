// What stands between products and attention: counters and copies.
#pragma once

#include <cstring>

#include "phases.h"

namespace river {

inline void count(const void* args, int part, int) {
  const auto& a = *static_cast<const CountArgs*>(args);
  if (part == 0) *a.out = *a.a + (a.b ? *a.b : 0) + a.by;
}

inline void copy(const void* args, int part, int parts) {
  const auto& a = *static_cast<const CopyArgs*>(args);
  const int64_t first = a.bytes * part / parts, end = a.bytes * (part + 1) / parts;
  std::memcpy(static_cast<char*>(a.to) + first, static_cast<const char*>(a.from) + first, end - first);
}

}  // namespace river
