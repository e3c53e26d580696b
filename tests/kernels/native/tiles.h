// AMX tiles in software, as Intel's manual defines TDPBF16PS, in place of the instructions of immintrin.h. A tile that
// is used before it is configured, or beyond its sizes, ends the process.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace river::emulated {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[kMostRows][kMostBytes];

  float bfloat16(int row, int i) const {
    const uint32_t bits = uint32_t(data[row][2 * i]) << 16 | uint32_t(data[row][2 * i + 1]) << 24;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

inline thread_local Tile tiles[kTiles];

inline Tile& configured(int number) {
  if (number >= kTiles || tiles[number].rows == 0) std::abort();
  return tiles[number];
}

// The layout of memory: palette, start row, 14 reserved bytes, 16 times 2 bytes of a row's bytes, 16 numbers of rows.
inline void configure(const void* memory) {
  const auto* config = static_cast<const uint8_t*>(memory);
  if (config[0] != 1 || config[1] != 0) std::abort();
  for (int number = 0; number < kTiles; ++number) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * number, 2);
    const int rows = config[48 + number];
    if (rows > kMostRows || bytes > kMostBytes || bytes % 4) std::abort();
    tiles[number].rows = bytes ? rows : 0;
    tiles[number].bytes = bytes;
  }
}

inline void release() {
  for (Tile& tile : tiles) tile.rows = 0;
}

inline void zero(int number) {
  Tile& tile = configured(number);
  std::memset(tile.data, 0, sizeof tile.data);
}

inline void load(int number, const void* from, int64_t stride) {
  zero(number);
  Tile& tile = tiles[number];
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(tile.data[row], static_cast<const uint8_t*>(from) + row * stride, tile.bytes);
}

inline void store(int number, void* to, int64_t stride) {
  const Tile& tile = configured(number);
  for (int row = 0; row < tile.rows; ++row)
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, tile.data[row], tile.bytes);
}

inline void multiply(int sums, int left, int right) {
  Tile& c = configured(sums);
  const Tile &a = configured(left), &b = configured(right);
  if (a.rows != c.rows || b.bytes != c.bytes || a.bytes / 4 > b.rows) std::abort();
  for (int row = 0; row < c.rows; ++row) {
    auto* const outputs = reinterpret_cast<float*>(c.data[row]);
    for (int n = 0; n < c.bytes / 4; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < a.bytes / 4; ++k) {
        even += a.bfloat16(row, 2 * k) * b.bfloat16(k, 2 * n);
        odd += a.bfloat16(row, 2 * k + 1) * b.bfloat16(k, 2 * n + 1);
      }
      outputs[n] += even + odd;
    }
  }
}

}  // namespace river::emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig river::emulated::configure
#define _tile_release river::emulated::release
#define _tile_zero river::emulated::zero
#define _tile_loadd river::emulated::load
#define _tile_stored river::emulated::store
#define _tile_dpbf16ps river::emulated::multiply
