// bfloat16 matmuls in tiles (AMX): 16 output features x 32 input features x 16 rows per instruction, with weights read
// in place. More than 16 rows multiply two blocks by two blocks, so that each tile is used twice. Weights are the left
// operand; activations (`kAmxTiles`) interleave pairs. Every output is summed in one order for any rows. A block of
// features that ends early or belongs to two matrices is read from a copy.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>

#include "kernels/bf12.h"
#include "kernels/gemm_blocked.h"

namespace river {

constexpr int kStep = 32;  // input features of one tile

// Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 activations of `rows` rows, at most 16.
class Tiles {
 public:
  explicit Tiles(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const uint16_t wide = uint16_t(4 * rows);
    for (int tile = 0; tile < 8; ++tile) {
      config.bytes[tile] = tile == 4 || tile == 5 ? 64 : wide;
      config.rows[tile] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

class BlockOfWeights {
 public:
  // Of two blocks that share the memory of a piece `which` tells which one this is. The next one is expected to lie
  // `ahead` blocks behind; `keeps`: of 12-bit weights.
  BlockOfWeights(const GemmArgs& a, int64_t n, int which, uint16_t* memory, int ahead, Keeps keeps)
      : a_(a),
        first_(n * kBlock),
        count_(int(std::min<int64_t>(kBlock, a.epilogue.out_features - first_))),
        ahead_(ahead) {
    if (a.palette) {
      unpacked_.emplace(a, which, memory, keeps);
      unpacked_->begin(n);
      return;
    }
    const int matrix = matrix_of(a.dense, first_);
    if (count_ == kBlock && first_ + kBlock <= a.dense.first[matrix + 1]) in_place_ = row(0);
  }

  // Input features i to i + 31, zeros where there are none; the stride is of bytes.
  Matrix<const char> at(int64_t i) {
    if (a_.palette) {
      const Matrix<const uint16_t> w = unpacked_->reach_all(i, ahead_);
      return {reinterpret_cast<const char*>(w.data), w.stride * 2};
    }
    if (in_place_ && i + kStep <= a_.in_features) return {in_place_ + i * 2, int64_t(a_.in_features) * 2};
    std::memset(copy_, 0, sizeof copy_);
    const int64_t features = std::min<int64_t>(a_.in_features - i, kStep);
    for (int j = 0; j < count_; ++j) std::memcpy(copy_ + j * kStep, row(j) + i * 2, features * 2);
    return {reinterpret_cast<const char*>(copy_), kStep * 2};
  }

  // Asks for lines 16 i to 16 i + 15 of the next block.
  void fetch(int64_t i) const {
    if (!in_place_) return;
    const char* lines = in_place_ + (int64_t(ahead_) * a_.in_features * 2 + i * 64) * kBlock;
    for (int line = 0; line < kBlock; ++line) __builtin_prefetch(lines + line * 64, 0, 2);
  }

 private:
  const char* row(int j) const {
    const int of = matrix_of(a_.dense, first_ + j);
    return static_cast<const char*>(a_.dense.data[of]) + (first_ + j - a_.dense.first[of]) * a_.in_features * 2;
  }

  const GemmArgs& a_;
  const int64_t first_;
  const int count_, ahead_;
  const char* in_place_ = nullptr;
  std::optional<UnpackedBlock> unpacked_;  // of 12-bit weights
  alignas(64) uint16_t copy_[kBlock * kStep];
};

// All rows, of which there are at most 16.
inline void microkernel_amx(const GemmArgs& a, int64_t n, uint16_t* memory, float (*y)[kBlock]) {
  alignas(64) float sums[kBlock * kBlock];
  BlockOfWeights weights(a, n, 0, memory, 1, Keeps::kOneUnit);
  const int wide = 4 * a.rows;
  const char* x = static_cast<const char*>(a.x.values);
  _tile_zero(0);
  for (int64_t i = 0; i < a.in_features; i += kStep) {
    const Matrix<const char> w = weights.at(i);
    weights.fetch(i / kStep);
    _tile_loadd(4, w.data, w.stride);
    _tile_loadd(6, x + i / 2 * wide, wide);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, sums, wide);
  for (int r = 0; r < a.rows; ++r)
    for (int i = 0; i < kBlock; ++i) y[r][i] = sums[i * a.rows + r];
}

inline void gemm_amx(const GemmArgs& a, int part, int parts) {
  const Tiles tiles(a.rows);
  const Piece piece(a, part, parts);
  gemm_blocked(a, part, parts, [&](const GemmArgs& a, int64_t n, int, int, float (*y)[kBlock]) {
    microkernel_amx(a, n, piece.memory(), y);
  });
}

// Of two blocks of features and two blocks of rows: [features, rows, 16 features, 16 rows].
using Sums = float[2][2][kBlock * kBlock];

// Sums two blocks of features for blocks `rows` of rows; `first`: asks for the next weights.
inline void microkernel_amx_multi(const GemmArgs& a, BlockOfWeights& weights, BlockOfWeights& others,
                                  const int64_t (&rows)[2], bool first, Sums& sums) {
  const int64_t k = a.in_features, bytes = a.padded_features() * kBlock * 2;
  const auto* values = static_cast<const char*>(a.x.values);
  const char *x = values + rows[0] * bytes, *other_x = values + rows[1] * bytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < k; i += kStep) {
    const Matrix<const char> w = weights.at(i), other = others.at(i);
    if (first) {
      weights.fetch(i / kStep);
      others.fetch(i / kStep);
    }
    _tile_loadd(4, w.data, w.stride);
    _tile_loadd(6, x + i * kBlock * 2, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, other_x + i * kBlock * 2, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, other.data, other.stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[0][1], 64);
  _tile_stored(2, sums[1][0], 64);
  _tile_stored(3, sums[1][1], 64);
}

inline void gemm_amx_multi(const GemmArgs& a, int part, int parts) {
  const Tiles tiles(kBlock);
  const Piece piece(a, part, parts);
  alignas(64) Sums sums;
  alignas(64) float y[2][kBlock][kBlock];
  const Epilogue& e = a.epilogue;
  const int64_t blocks = ceil_div(e.out_features, kBlock), pairs = (blocks + 1) / 2, last = (a.rows - 1) / kBlock;
  const int ahead = e.gated ? 1 : 2;
  const Keeps keeps = a.rows > 2 * kBlock ? Keeps::kAll : Keeps::kOneUnit;
  for (int first = 0; first < a.rows; first += kRowsTogether)
    for (auto [pair, end] = share_of(pairs, part, parts); pair < end; ++pair) {
      const int64_t n = e.gated ? pair : 2 * pair, other = e.gated ? pair + pairs : std::min(n + 1, blocks - 1);
      BlockOfWeights weights(a, n, 0, piece.memory(), ahead, keeps), others(a, other, 1, piece.memory(), ahead, keeps);
      for (int row = first; row < std::min(first + kRowsTogether, a.rows); row += 2 * kBlock) {
        microkernel_amx_multi(a, weights, others, {row / kBlock, std::min<int64_t>(row / kBlock + 1, last)},
                              row == first, sums);
        for (int half = 0, at = row; half < 2 && at < a.rows; ++half, at += kBlock) {
          const int rows = std::min(kBlock, a.rows - at);
          for (int which = 0; which < 2; ++which) transpose(sums[which][half], kBlock, y[which]);
          epilogue(e, n * kBlock, at, rows, y[0][0], y[1][0]);
          if (!e.gated && other != n) epilogue(e, other * kBlock, at, rows, y[1][0], nullptr);
        }
      }
    }
}

}  // namespace river
