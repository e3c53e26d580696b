// Products of bfloat16 matrices in tiles (AMX), for up to 16 rows at the price of one: 16 output features times 32 input
// features times all rows are one instruction, which reads the weights where the model keeps them.
//
// Weights are the left operand, 16 rows of 64 bytes; activations are the right one, prepared so that the two values of
// a pair lie side by side, and the pairs of all rows after each other (`kTiled`). Every output is summed in one order,
// whatever the number of rows. A block of features that no tile can read in place, because it ends early or belongs to
// two matrices, is read from a copy.
#pragma once

#include <algorithm>
#include <cstring>

#include "dense.h"
#include "phases.h"
#include "vectors.h"

namespace river {

#if defined(RIVER_ISA_AMX)

constexpr bool kTiles = true;
constexpr int kStep = 32;         // input features of one tile

// Tile 0 holds the sums, 1 weights, 2 activations.
class Tiles {
 public:
  explicit Tiles(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const uint16_t wide = uint16_t(4 * rows);
    for (int tile : {0, 1, 2}) {
      config.bytes[tile] = tile == 1 ? 64 : wide;
      config.rows[tile] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// Where 16 rows of weights lie, and how far apart.
struct Weights {
  const char* data;
  int64_t bytes;
};

inline Weights weights_of_block(const LinearArgs& a, int64_t first, int count, int64_t from, int64_t features,
                                uint16_t* copy) {
  const int matrix = matrix_of(a.dense, first);
  const int64_t bytes = int64_t(a.in_features) * 2;
  if (count == kBlock && first + kBlock <= a.dense.first[matrix + 1] && features >= kStep)
    return {static_cast<const char*>(a.dense.data[matrix]) + (first - a.dense.first[matrix]) * bytes + from * 2, bytes};
  std::memset(copy, 0, kBlock * kStep * 2);
  for (int i = 0; i < count; ++i) {
    const int of = matrix_of(a.dense, first + i);
    const char* row = static_cast<const char*>(a.dense.data[of]) + (first + i - a.dense.first[of]) * bytes;
    std::memcpy(copy + i * kStep, row + from * 2, std::min<int64_t>(features, kStep) * 2);
  }
  return {reinterpret_cast<const char*>(copy), kStep * 2};
}

// One block of output features for all rows, of which there are at most 16.
inline void tiled_block(const LinearArgs& a, int64_t n, float (*y)[kBlock]) {
  alignas(64) uint16_t copy[kBlock * kStep];
  alignas(64) float sums[kBlock * kBlock];
  const int64_t first = n * kBlock, k = a.in_features;
  const int count = int(std::min<int64_t>(kBlock, a.out_features - first)), wide = 4 * a.rows;
  const char* x = static_cast<const char*>(a.x.values);
  const int matrix = matrix_of(a.dense, first);
  const char* next = nullptr;
  if (first + 2 * kBlock <= a.dense.first[matrix + 1])
    next = static_cast<const char*>(a.dense.data[matrix]) + (first + kBlock - a.dense.first[matrix]) * k * 2;
  _tile_zero(0);
  for (int64_t i = 0; i < k; i += kStep) {
    const Weights w = weights_of_block(a, first, count, i, k - i, copy);
    // (A block is one piece of memory. The next one is fetched line by line, in the order in which it lies there.)
    for (int line = 0; next && line < kBlock; ++line) __builtin_prefetch(next + (i / kStep * kBlock + line) * 64, 0, 2);
    _tile_loadd(1, w.data, w.bytes);
    _tile_loadd(2, x + i / 2 * wide, wide);
    _tile_dpbf16ps(0, 1, 2);
  }
  _tile_stored(0, sums, wide);
  for (int r = 0; r < a.rows; ++r)
    for (int i = 0; i < kBlock; ++i) y[r][i] = sums[i * a.rows + r];
}

#else

constexpr bool kTiles = false;

struct Tiles {
  explicit Tiles(int) {}
};

inline void tiled_block(const LinearArgs&, int64_t, float (*)[kBlock]) {}

#endif

}  // namespace river
