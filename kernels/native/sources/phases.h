// What a phase is, the arguments of every phase, and the table through which one library offers them to the other.
//
// A phase is a function that computes part `part` of `parts` of something: it splits its own work, parts may run on any
// thread, in any order and at the same time, and a phase starts when all parts of the one before it are done. It works
// on raw pointers, allocates nothing and knows no tensor. Shapes: M rows, N output features, K input features, G group
// size.
#pragma once

#include <cstdint>

namespace river {

constexpr int kBlock = 16;  // output features that lie side by side in the packed weights

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// How prepared activations lie in memory: one byte or one float32 for each feature.
enum Format : int32_t { kInt8 = 0, kSingle = 1 };

// Activations that a product reads: K rounded up to whole groups, the padding zero.
struct Activations {
  void* values;    // [M, K'] int8_t or float by `format`; the latter in the order of the packed nibbles
  float* scale;    // [M, K' / G] of the int8 values, unused otherwise
  float* sum;      // [M, K' / G] sums of the activations before they were rounded
  int32_t* start;  // [M, K' / G] -8 times the sum of the int8 values, unused otherwise
  int32_t format;
};

// Prepares x for the products that read it. Parts split the groups of all rows.
struct PrepareArgs {
  const void* x;     // [M, K] of `dtype`
  int64_t x_stride;  // elements between two rows
  Activations out;
  int32_t dtype, rows, in_features, group_size;
};

// y = x W^T + bias, summed in float32. Parts split the blocks of output features.
struct LinearArgs {
  Activations x;
  const uint8_t* weight;       // [N' / 16, K' / G, G / 8, 64]: byte 4 n + j of line i holds the features 8 i + j and
                               // 8 i + 4 + j of its group, the latter in the high nibble, for output feature n
  const uint16_t* scale_zero;  // bfloat16 [N' / 16, K' / G, 16, 2]: w = (q - 8) * scale + zero
  const void* bias;            // [N] of `dtype`, or null
  void* y;                     // [M, N] of `dtype`
  int64_t y_stride;
  int32_t dtype, rows, in_features, out_features, group_size;
};

using Run = void (*)(const void* args, int part, int parts);

struct Phase {
  Run run;
  const void* args;
  int32_t parts;
};

// The phases of one instruction set. A new phase is a new entry at the end.
struct Kernels {
  const char* isa;
  Run prepare;  // PrepareArgs
  Run linear;   // LinearArgs
};

}  // namespace river
