// Products: x W^T + bias, an activation or a gate, and a residual. Those with weights of 4 bits are here, others in
// dense.h.
//
// A block of 16 output features reads its weights once, line by line; up to kRows rows of activations share what was
// unpacked. Every output is summed in one order, whatever the number of rows, threads or parts: group by group, a
// group's products first (exactly, in integers), then times its scale, then its zero times
// the sum of the activations. Not handled: many rows at the speed of a matrix product (no tiles beyond one block of
// weights).
#pragma once

#include <algorithm>
#include <cstring>

#include "dense.h"
#include "functions.h"
#include "pairs.h"
#include "phases.h"
#include "scalars.h"
#include "tiles.h"
#include "transpose.h"
#include "vectors.h"

namespace river {

constexpr int kRows = 8;
constexpr int kLine = 64;

// Asks for the weights that this thread reads some 300 ns later: the processor's own prefetching stops at every page.
RIVER_INLINE void fetch(const uint8_t* weight) { __builtin_prefetch(weight + 4096, 0, 2); }

// One row of prepared activations.
struct Row {
  const int8_t* values;
  const float* scale;
  const float* sum;
  const int32_t* start;
};

RIVER_INLINE Row row_of(const Activations& x, int64_t row, int64_t groups, int64_t group_size) {
  const auto* values = static_cast<const int8_t*>(x.values) + row * groups * group_size;
  return {values, x.scale + row * groups, x.sum + row * groups, x.start + row * groups};
}

// Returns, for R rows and one vector of output features, the sum of (q - 8) x over one group.
template <int R>
RIVER_INLINE void sums_of_group(const uint8_t* w, const Row* x, int64_t g, int lines, Floats* out) {
  Dots low[R], high[R];
  for (int r = 0; r < R; ++r) low[r].begin(x[r].start[g]), high[r].begin(0);
  for (int i = 0; i < lines; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Ints line = load(w + (i + j) * kLine);
      fetch(w + (i + j) * kLine);
      const Ints first = low_nibbles(line), second = high_nibbles(line);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int8_t* values = x[r].values + (g * lines + i + j) * 8;
        low[r].add(first, values);
        (R == 1 ? high[r] : low[r]).add(second, values + 4);
      }
    }
    for (int r = 0; r < R; ++r) low[r].widen(), high[r].widen();
  }
  for (int r = 0; r < R; ++r) {
    const Ints total = R == 1 ? add(low[r].sum, high[r].sum) : low[r].sum;
    out[r] = mul(to_floats(total), every(x[r].scale[g]));
  }
}

// One block of output features for `rows` <= R rows; the last row stands in for those that are not there.
template <int R>
void quantized_block(const LinearArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
  const int lines = a.group_size / 8;
  const int64_t groups = (a.in_features + a.group_size - 1) / a.group_size;
  Row x[R];
  for (int r = 0; r < R; ++r) x[r] = row_of(a.x, row + std::min(r, rows - 1), groups, a.group_size);
  const uint8_t* weight = a.weight + n * groups * lines * kLine;
  const auto* parameters = reinterpret_cast<const uint8_t*>(a.scale_zero) + n * groups * kLine;
  Floats sums[kHalves][R], products[R];
  for (auto& half : sums)
    for (Floats& sum : half) sum = zeros();
  for (int64_t g = 0; g < groups; ++g, weight += lines * kLine, parameters += kLine) {
    for (int h = 0; h < kHalves; ++h) {
      sums_of_group<R>(weight + h * 4 * kLanes, x, g, lines, products);
      const Ints pair = load(parameters + h * 4 * kLanes);
      const Floats scale = low_bfloat16(pair), zero = high_bfloat16(pair);
      for (int r = 0; r < R; ++r) sums[h][r] = fma(zero, every(x[r].sum[g]), fma(products[r], scale, sums[h][r]));
    }
  }
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < kHalves; ++h) store(y[r] + h * kLanes, sums[h][r]);
}

inline void add_bias(const LinearArgs& a, int64_t first, int rows, float (*y)[kBlock]) {
  const int count = int(std::min<int64_t>(kBlock, a.out_features - first));
  for (int i = 0; i < count; ++i) {
    const int vector = matrix_of(a.bias, first + i);
    const float bias = load_scalar(a.bias.data[vector], first + i - a.bias.first[vector], a.dtype);
    for (int r = 0; r < rows; ++r) y[r][i] += bias;
  }
}

template <int R, int F>
void block(const LinearArgs& a, int64_t n, int row, int rows, float (*y)[kBlock]) {
  if constexpr (F == kTiled)
    tiled_block(a, n, y);
  else if constexpr (F == kPairs)
    pairs_block(a, n, row, rows, y);
  else if constexpr (F == kInt8)
    quantized_block<R>(a, n, row, rows, y);
  else if (a.dtype == kFloat32)
    dense_block<kFloat32>(a, n, row, rows, y);
  else if (a.dtype == kBFloat16)
    dense_block<kBFloat16>(a, n, row, rows, y);
  else
    dense_block<kFloat16>(a, n, row, rows, y);
  if (a.bias.count) add_bias(a, n * kBlock, rows, y);
}

// Activates, gates, adds the residual and writes what was summed for a block of features of at most 16 rows; `up` where
// it is gated.
inline void rest_of_block(const LinearArgs& a, int64_t n, int row, int rows, float (*y)[kBlock],
                          const float (*up)[kBlock]) {
  const int64_t width = a.gated ? a.out_features / 2 : a.out_features, first = n * kBlock;
  const int count = int(std::min<int64_t>(kBlock, width - first));
  float* const sums = y[0];
  const int all = rows * kBlock;
  activate(a.activation, sums, all);
  const float* const others = up[0];
  for (int i = 0; a.gated && i < all; ++i) sums[i] *= others[i];
  if (a.residual) {
    alignas(64) float residual[16 * kBlock];
    load_block(a.residual, row * a.residual_stride + first, a.residual_stride, rows, count, a.dtype, residual);
    for (int i = 0; i < all; ++i) sums[i] += residual[i];
  }
  store_block(a.y, row * a.y_stride + first, a.y_stride, rows, count, a.dtype, sums);
}

template <int R, int F>
void block_and_rest(const LinearArgs& a, int64_t n, int row, int rows) {
  float y[R][kBlock], up[R][kBlock];
  block<R, F>(a, n, row, rows, y);
  if (a.gated) block<R, F>(a, n + a.out_features / 2 / kBlock, row, rows, up);
  rest_of_block(a, n, row, rows, y, up);
}

// The blocks of output features that a part computes: its share of all of them, or of those that are wanted. It also
// writes what lies between these and the next ones.
class BlocksOfPart {
 public:
  BlocksOfPart(const LinearArgs& a, int part, int parts) : a_(a) {
    const int64_t width = a.gated ? a.out_features / 2 : a.out_features;
    blocks_ = (width + kBlock - 1) / kBlock;
    if (a.wanted && a.wanted[0] < blocks_) wanted_ = a.wanted + 1;
    count_ = wanted_ ? a.wanted[0] : blocks_;
    first = count_ * part / parts;
    end = count_ * (part + 1) / parts;
  }

  int64_t operator[](int64_t i) const { return wanted_ ? wanted_[i] : i; }

  void write_unwanted() const {
    if (!wanted_) return;
    for (int64_t i = first; i < end; ++i) {
      if (i == 0) write(0, wanted_[0]);
      write(wanted_[i] + 1, i + 1 < count_ ? wanted_[i + 1] : blocks_);
    }
  }

  int64_t first, end;

 private:
  void write(int64_t from, int64_t to) const {
    alignas(64) float unwanted[kBlock];
    std::fill(unwanted, unwanted + kBlock, kUnwanted);
    for (int64_t n = from; n < to; ++n) {
      const int count = int(std::min<int64_t>(kBlock, a_.out_features - n * kBlock));
      for (int row = 0; row < a_.rows; ++row)
        store_values(a_.y, row * a_.y_stride + n * kBlock, count, a_.dtype, unwanted);
    }
  }

  const LinearArgs& a_;
  const int32_t* wanted_ = nullptr;
  int64_t blocks_, count_;
};

inline void quantized_linear(const LinearArgs& a, int part, int parts) {
  const BlocksOfPart blocks(a, part, parts);
  blocks.write_unwanted();
  for (int64_t i = blocks.first; i < blocks.end; ++i) {
    const int64_t n = blocks[i];
    for (int row = 0; row < a.rows; row += kRows) {
      const int rows = std::min(kRows, a.rows - row);
      if (rows == 1)
        block_and_rest<1, kInt8>(a, n, row, rows);
      else if (rows == 2)
        block_and_rest<2, kInt8>(a, n, row, rows);
      else if (rows <= 4)
        block_and_rest<4, kInt8>(a, n, row, rows);
      else if (rows <= 6)
        block_and_rest<6, kInt8>(a, n, row, rows);
      else
        block_and_rest<8, kInt8>(a, n, row, rows);
    }
  }
}

constexpr int kRowsTogether = 256;           // whose activations stay in a core's cache while weights pass by
constexpr int64_t kBytesTogether = 1 << 18;  // bytes of such activations in float32
constexpr int32_t kOfBfloat16 = kTiles ? kTiled : kHasPairs ? kPairs : kSplit;

// Adds what follows the sums of blocks `n` of features, gate and up where it is gated, for 32 rows from `row` on.
inline void rest_of_pair(const LinearArgs& a, const int64_t (&n)[2], int row, const Sums& sums) {
  alignas(64) float y[2][kBlock][kBlock];
  for (int half = 0; half < 2 && row < a.rows; ++half, row += kBlock) {
    const int rows = std::min(kBlock, a.rows - row);
    for (int which = 0; which < 2; ++which) {
      transpose(sums[which][half], kBlock, y[which]);
      if (a.bias.count) add_bias(a, n[which] * kBlock, rows, y[which]);
    }
    rest_of_block(a, n[0], row, rows, y[0], y[1]);
    if (!a.gated && n[1] != n[0]) rest_of_block(a, n[1], row, rows, y[1], nullptr);
  }
}

inline void linear_in_many_tiles(const LinearArgs& a, int part, int parts) {
  const Tiles tiles(kBlock);
  alignas(64) Sums sums;
  const int64_t blocks = (a.out_features + kBlock - 1) / kBlock, pairs = (blocks + 1) / 2, last = (a.rows - 1) / kBlock;
  for (int first = 0; first < a.rows; first += kRowsTogether)
    for (int64_t pair = pairs * part / parts; pair < pairs * (part + 1) / parts; ++pair) {
      const int64_t neighbours[2] = {2 * pair, std::min(2 * pair + 1, blocks - 1)}, halves[2] = {pair, pair + pairs};
      const auto& n = a.gated ? halves : neighbours;
      BlockOfWeights weights(a, n[0]), others(a, n[1]);
      for (int row = first; row < std::min(first + kRowsTogether, a.rows); row += 2 * kBlock) {
        const int ahead = row > first ? 0 : a.gated ? 1 : 2;
        multiply_blocks(a, weights, others, {row / kBlock, std::min<int64_t>(row / kBlock + 1, last)}, ahead, sums);
        rest_of_pair(a, n, row, sums);
      }
    }
}

// Blocks of 16 rows, one after the other for each block of features.
template <int F>
void linear_in_blocks(const LinearArgs& a, int part, int parts) {
  const int64_t width = a.gated ? a.out_features / 2 : a.out_features, blocks = (width + kBlock - 1) / kBlock;
  const int fit = int(std::max<int64_t>(kBytesTogether / 4 / padded_features(a) / kBlock, 1)) * kBlock;
  const int together = F == kPlain ? std::min(fit, kRowsTogether) : kRowsTogether;
  for (int first = 0; first < a.rows; first += together)
    for (int64_t n = blocks * part / parts; n < blocks * (part + 1) / parts; ++n)
      for (int row = first; row < std::min(first + together, a.rows); row += kBlock)
        block_and_rest<16, F>(a, n, row, std::min(kBlock, a.rows - row));
}

inline void linear_in_tiles(const LinearArgs& a, int part, int parts) {
  if (a.rows > kBlock) return linear_in_many_tiles(a, part, parts);
  const Tiles tiles(a.rows);
  linear_in_blocks<kTiled>(a, part, parts);
}

// A product with one weight for all rows.
inline void linear_with_one(const LinearArgs& a, int part, int parts) {
  if (a.x.format == kInt8)
    quantized_linear(a, part, parts);
  else if (a.x.format == kTiled)
    linear_in_tiles(a, part, parts);
  else if (a.x.format == kPairs)
    linear_in_blocks<kPairs>(a, part, parts);
  else
    linear_in_blocks<kPlain>(a, part, parts);
}

// `count` rows from `row` on, which meet expert number `chosen`.
inline LinearArgs rows_of_expert(const LinearArgs& all, int row, int count, int64_t chosen) {
  LinearArgs a = all;
  const int64_t groups = (a.in_features + a.group_size - 1) / a.group_size;
  const int64_t blocks = (a.out_features + kBlock - 1) / kBlock;
  const Row x = row_of(a.x, row, groups, a.group_size);
  a.x = {const_cast<int8_t*>(x.values), const_cast<float*>(x.scale), const_cast<float*>(x.sum),
         const_cast<int32_t*>(x.start), a.x.format};
  a.weight += chosen * blocks * groups * a.group_size * kBlock / 2;
  a.scale_zero += chosen * blocks * groups * kBlock * 2;
  a.y = static_cast<char*>(a.y) + row * a.y_stride * bytes_of(a.dtype);
  a.rows = count;
  return a;
}

// Neighbours that chose the same expert share what is read of its weight.
inline void linear_with_chosen(const LinearArgs& a, int part, int parts) {
  for (int row = 0, end; row < a.rows; row = end) {
    const int64_t chosen = a.expert[row];
    for (end = row + 1; end < a.rows && a.expert[end] == chosen;) ++end;
    if (chosen >= 0 && chosen < a.experts) {
      linear_with_one(rows_of_expert(a, row, end - row, chosen), part, parts);
    } else if (part == 0) {
      for (int r = row; r < end; ++r)
        std::memset(static_cast<char*>(a.y) + r * a.y_stride * bytes_of(a.dtype), 0,
                    a.out_features * bytes_of(a.dtype));
    }
  }
}

inline void linear(const void* args, int part, int parts) {
  const auto& a = *static_cast<const LinearArgs*>(args);
  if (a.expert)
    linear_with_chosen(a, part, parts);
  else
    linear_with_one(a, part, parts);
}

}  // namespace river
