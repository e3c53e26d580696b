// Finding 4-bit grids, apart from the kernels: weighted fits of scale and zero, and rounding of columns in order with
// each one's error made up for by those that follow (GPTQ). What is computed is written down in
// `kernels/quant/calibrated.py`, whose PyTorch code is the reference; one thread runs each call.
//
// Vectors are of 16 floats on every processor: what has no such registers gets several instructions.
#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Mask __attribute__((vector_size(64)));

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // vectors of output features that are rounded together
#else
constexpr int kVectors = 1;
#endif
constexpr int kRows = kVectors * kLanes;
constexpr int kBlock = 32;    // columns whose errors reach the later ones together
constexpr int kTogether = 4;  // later columns that are updated together
constexpr int kLeast = -8, kMost = 7;
constexpr int kShrinks = 12, kRefits = 2;

inline Lanes every(float x) { return x - Lanes{}; }
inline Lanes load(const float* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Lanes x) { std::memcpy(p, &x, sizeof x); }
inline float sum_of(Lanes x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// The nearest point of a grid, q - 8. Numbers this small are rounded, half to even, by adding and taking away 1.5 2^23.
inline Lanes nearest(Lanes weight, Lanes scale, Lanes zero) {
  const Lanes least = every(kLeast), most = every(kMost), large = every(12582912.0f);
  Lanes q = (weight - zero) / scale;
  q = q < least ? least : q;
  q = q > most ? most : q;
  return (q + large) - large;
}

float to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Grid {
  float scale, zero;
};

// One group of weights, with the importance of each one's squared error.
struct Group {
  const float* weights;
  const float* importance;
  int64_t size;
  bool bfloat16;
  float low, high;

  Group(const float* weights, const float* importance, int64_t size, bool bfloat16)
      : weights(weights), importance(importance), size(size), bfloat16(bfloat16), low(weights[0]), high(weights[0]) {
    for (int64_t i = 1; i < size; ++i) low = std::min(low, weights[i]), high = std::max(high, weights[i]);
  }

  Grid storable(float scale, float zero) const {
    if (bfloat16) scale = to_bfloat16(scale);
    const bool constant = scale < FLT_MIN;
    zero = constant ? low : zero;
    return {constant ? 1.0f : scale, bfloat16 ? to_bfloat16(zero) : zero};
  }

  float noise(Grid grid) const {
    const Lanes scale = every(grid.scale), zero = every(grid.zero);
    Lanes sum = {};
    for (int64_t i = 0; i < size; i += kLanes) {
      const Lanes w = load(weights + i), off = nearest(w, scale, zero) * scale + zero - w;
      sum += off * off * load(importance + i);
    }
    return sum_of(sum);
  }

  // The scale and zero that suit the integers of a grid best, by weighted least squares.
  Grid refitted(Grid grid) const {
    const Lanes scale = every(grid.scale), zero = every(grid.zero);
    Lanes of_q = {}, of_w = {};
    for (int64_t i = 0; i < size; i += kLanes) {
      const Lanes w = load(weights + i), counts = load(importance + i);
      of_q += nearest(w, scale, zero) * counts;
      of_w += w * counts;
    }
    const float mean_q = sum_of(of_q), mean_w = sum_of(of_w);
    Lanes of_squares = {}, of_products = {};
    for (int64_t i = 0; i < size; i += kLanes) {
      const Lanes w = load(weights + i), spread = nearest(w, scale, zero) - mean_q;
      const Lanes weighted = spread * load(importance + i);
      of_squares += weighted * spread;
      of_products += weighted * w;
    }
    const float variance = sum_of(of_squares), slope = sum_of(of_products) / variance;
    const float found = variance > 0 && slope > 0 ? slope : grid.scale;
    return {found, mean_w - found * mean_q};
  }

  Grid fitted() const {
    const float step = (high - low) / 15;
    Grid best = storable(step, low + 8 * step);
    float least = noise(best);
    for (int i = 0; i < kShrinks + kRefits; ++i) {
      Grid next = refitted(best);
      if (i < kShrinks) {
        const float scale = (high - low) * (1 - 0.04f * float(i + 1)) / 15;
        next = {scale, (low + high + scale) / 2};
      }
      next = storable(next.scale, next.zero);
      const float of_next = noise(next);
      if (of_next < least) best = next, least = of_next;
    }
    return best;
  }
};

// `kRows` output features of a matrix, column by column: a column is one run of memory.
class Rows {
 public:
  Rows(int64_t features, int64_t groups)
      : features_(features), left_(features * kRows), scale_(groups * kRows), zero_(groups * kRows),
        errors_(kBlock * kRows) {}

  // Rows that are missing repeat the first one, and nothing is stored for them.
  void take(const float* weight, const float* scale, const float* zero, int64_t groups, int64_t rows) {
    for (int64_t row = 0; row < kRows; ++row) {
      const int64_t from = row < rows ? row : 0;
      for (int64_t k = 0; k < features_; ++k) left_[k * kRows + row] = weight[from * features_ + k];
      for (int64_t g = 0; g < groups; ++g) {
        scale_[g * kRows + row] = scale[from * groups + g];
        zero_[g * kRows + row] = zero[from * groups + g];
      }
    }
  }

  void round(const int64_t* group_of, const float* factor) {
    for (int64_t start = 0; start < features_; start += kBlock) {
      const int64_t end = std::min(start + kBlock, features_);
      for (int64_t k = start; k < end; ++k) round_column(k, start, end, group_of[k], factor + k * features_);
      int64_t column = end;
      for (; column + kTogether <= features_; column += kTogether) make_up<kTogether>(column, start, end, factor);
      for (; column < features_; ++column) make_up<1>(column, start, end, factor);
    }
  }

  void give(uint8_t* q, int64_t rows) const {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < features_; ++k) q[row * features_ + k] = uint8_t(int(left_[k * kRows + row]) - kLeast);
    }
  }

 private:
  // Leaves q - 8 in the column's place, and moves those of its own block.
  void round_column(int64_t k, int64_t start, int64_t end, int64_t group, const float* factors) {
    const float own = factors[k];
    for (int v = 0; v < kRows; v += kLanes) {
      const Lanes scale = load(&scale_[group * kRows + v]), zero = load(&zero_[group * kRows + v]);
      const Lanes w = load(&left_[k * kRows + v]), q = nearest(w, scale, zero), error = (w - (q * scale + zero)) / own;
      store(&left_[k * kRows + v], q);
      store(&errors_[(k - start) * kRows + v], error);
      for (int64_t j = k + 1; j < end; ++j) {
        float* const other = &left_[j * kRows + v];
        store(other, load(other) - error * factors[j]);
      }
    }
  }

  // Moves `Columns` later columns by the errors of one block.
  template <int Columns>
  void make_up(int64_t column, int64_t start, int64_t end, const float* factor) {
    Lanes moved[Columns][kVectors];
    for (int c = 0; c < Columns; ++c) {
      for (int v = 0; v < kVectors; ++v) moved[c][v] = load(&left_[(column + c) * kRows + v * kLanes]);
    }
    for (int64_t k = start; k < end; ++k) {
      Lanes errors[kVectors];
      for (int v = 0; v < kVectors; ++v) errors[v] = load(&errors_[(k - start) * kRows + v * kLanes]);
      for (int c = 0; c < Columns; ++c) {
        const Lanes factors = every(factor[k * features_ + column + c]);
        for (int v = 0; v < kVectors; ++v) moved[c][v] -= errors[v] * factors;
      }
    }
    for (int c = 0; c < Columns; ++c) {
      for (int v = 0; v < kVectors; ++v) store(&left_[(column + c) * kRows + v * kLanes], moved[c][v]);
    }
  }

  int64_t features_;
  std::vector<float> left_, scale_, zero_, errors_;
};

}  // namespace

#define RIVER_EXPORTED extern "C" __attribute__((visibility("default")))

// weight: [rows, groups * size]; importance: [groups * size], sums to one in each group; scale, zero: [rows, groups].
// A group's size is a multiple of 16.
RIVER_EXPORTED void river_fit_grid(const float* weight, const float* importance, int64_t rows, int64_t groups,
                                   int64_t size, bool bfloat16, float* scale, float* zero) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t at = row * groups + group;
      const Grid grid = Group(weight + at * size, importance + group * size, size, bfloat16).fitted();
      scale[at] = grid.scale;
      zero[at] = grid.zero;
    }
  }
}

// weight, q: [rows, features], columns in the order of rounding; scale, zero: [rows, groups]; group_of: [features];
// factor: upper triangular [features, features].
RIVER_EXPORTED void river_round_compensating(const float* weight, const float* scale, const float* zero,
                                             const int64_t* group_of, const float* factor, int64_t rows,
                                             int64_t features, int64_t groups, uint8_t* q) {
  Rows some(features, groups);
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t here = std::min<int64_t>(kRows, rows - row);
    some.take(weight + row * features, scale + row * groups, zero + row * groups, groups, here);
    some.round(group_of, factor);
    some.give(q + row * features, here);
  }
}
