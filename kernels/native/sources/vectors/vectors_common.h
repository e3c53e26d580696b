// What vectors of all instruction sets share: loops over constants, and batches of rows.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "vectors/dtypes.h"

#define RIVER_INLINE inline __attribute__((always_inline))
#define RIVER_INLINED __attribute__((always_inline))  // of a lambda

namespace river {

// Bytes of weights that are asked for ahead, half a microsecond of a core's reading.
constexpr int kFetchedAhead = 8192;

// Asks for the line that lies so far ahead: the processor's own prefetching stops at every page.
RIVER_INLINE void fetch(const uint8_t* weight) { __builtin_prefetch(weight + kFetchedAhead, 0, 2); }

// Calls f with the constants 0 to N - 1: arrays indexed by them stay in registers, unlike in an unrolled loop.
template <int N, class F>
RIVER_INLINE void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      RIVER_INLINED { (f(std::integral_constant<int, I>()), ...); }(std::make_integer_sequence<int, N>());
}

// Splits `count` into equal batches of at most `Most`; calls f(size, as a constant, first, batch number, batches).
template <int Most, class F>
RIVER_INLINE void in_batches(int count, const F& f) {
  const int batches = (count + Most - 1) / Most;
  for (int batch = 0; batch < batches; ++batch) {
    const int first = count * batch / batches, size = count * (batch + 1) / batches - first;
    unrolled<Most>([&](auto i) RIVER_INLINED {
      if (i + 1 == size) f(std::integral_constant<int, i + 1>(), first, batch, batches);
    });
  }
}

RIVER_INLINE int32_t four_bytes(const int8_t* x) {
  int32_t value;
  std::memcpy(&value, x, 4);
  return value;
}

}  // namespace river
