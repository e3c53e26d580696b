// Phases, their arguments, and the table by which one library offers them to the other. A phase computes part `part` of
// `parts`; parts run on any thread, in any order, and a phase starts when the one before it is done. It allocates and
// throws nothing and knows no tensor. Shapes: M rows, N output and K input features, G group size; B sequences, H query
// heads, J key-value heads, D features of a head, S slots of a cache.
#pragma once

#include <cstdint>

namespace river {

constexpr int kBlock = 16;  // output features that lie side by side in the packed weights
// Units of 12-bit weights (bf12.h): output features, input features, and bytes.
constexpr int kFour = 4, kUnit = 64, kUnitBytes = 6 * kUnit;
constexpr int kMxGroup = 32;  // input features of MXFP4 weights that share a scale
// Of a stack [K, N]: blocks of output features that a part sums up together, and the bytes of one's sums (columns.h).
constexpr int kColumnBlocks = 256, kColumnBytes = 1024;

constexpr auto ceil_div(auto a, auto b) { return (a + b - 1) / b; }  // (of int32s in 32 bits, a faster division)

// What part `part` of `parts` takes of `count` things.
struct Share {
  int64_t first, end;
};
constexpr Share share_of(int64_t count, int part, int parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Where a matrix's rows begin, null without one, and elements between two of them.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
};
using Strided = Matrix<void>;

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kBool = 3, kInt8s = 4, kFloat8s = 5 };
enum Norm : int32_t { kNoNorm = 0, kRms = 1, kRmsPlusOne = 2, kLayerNorm = 3 };
enum Activation : int32_t { kIdentity = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4, kClampedSwish = 5 };
constexpr float kSwishLimit = 7.0f, kSwishSlope = 1.702f;  // of kClampedSwish
// Where a gate's features lie: there is none, all before the up projection's, or each before its partner.
enum Gate : int32_t { kNoGate = 0, kGateFirst = 1, kGatePairs = 2 };

// Prepared activations: int8 for 4-bit weights; float32 in order, or of every two vectors even and then odd features;
// bfloat16 rows or tiles; unchanged (normalised) for a library's matmul.
enum Format : int32_t { kInt8, kFloats, kEvenOdd, kBFloat16Rows, kAmxTiles, kUnchanged };

// Activations that a matmul reads: K rounded up to whole groups, the padding zero.
struct Activations {
  void* values;    // [M, K'] by `format`; kAmxTiles: [M / 16, K' / 2, 16, 2], of at most 16 rows [K' / 2, M, 2]
  float* scale;    // [M, K' / G] of the int8 values, unused otherwise
  float* sum;      // [M, K' / G] sums of the activations before they were rounded, unused otherwise
  int32_t* start;  // [M, K' / G] minus 8, the weights' middle, times the sum of the int8 values, unused otherwise
  int32_t format;
};

// Normalises x and prepares it for the matmuls that read it. Parts split the rows, without a norm their groups.
struct PrepareArgs {
  Strided x;                // [M, K] of `dtype`
  const void* norm_weight;  // [K] of `dtype`, null without a norm
  const void* norm_bias;    // [K] of `dtype` or null
  Strided residual;         // [M, K] of `dtype`, added in format kUnchanged, or null
  Activations out;
  const int32_t* order;  // [M] row m is row order[m] / each of x; null: row m
  int32_t dtype, rows, in_features, group_size, norm, each;
  float eps;

  int64_t groups() const { return ceil_div(in_features, group_size); }
};

constexpr int kMatrices = 4;

// Up to kMatrices matrices one below the other, or vectors one behind the other; row `first[i]` begins number i.
struct Rows {
  const void* data[kMatrices];
  int32_t first[kMatrices + 1];  // [count] of all rows at `count`
  int32_t count;                 // 0: there is nothing
};

// y = activation(sums + bias) + residual, or gated y = activation(first half) * second half + residual.
struct Epilogue {
  Rows bias;                                       // [N] of `dtype`, or none
  Strided residual;                                // [M, N] (gated [M, N / 2]) of `dtype`, or null
  Strided y;                                       // as the residual
  int32_t dtype, out_features, activation, gated;  // gated: a `Gate`, and N a multiple of 32

  int64_t width() const { return gated ? out_features / 2 : out_features; }
  int64_t blocks() const { return ceil_div(width(), kBlock); }
};

// Pieces of memory, one for each part that runs at a time: flags, 0 where a piece is free, in a whole number of lines,
// and behind them the pieces.
struct Pieces {
  int32_t* flags;
  int32_t count;
  int64_t each;  // bytes, whole lines

  int64_t flag_bytes() const { return ceil_div(int64_t(count) * 4, int64_t(64)) * 64; }
  int64_t bytes() const { return flag_bytes() + count * each; }
  char* at(int64_t piece) const { return reinterpret_cast<char*>(flags) + flag_bytes() + piece * each; }
};

// y = epilogue(x W^T), summed in float32. Parts split the blocks of output features.
struct GemmArgs {
  Activations x;
  const uint8_t* weight;        // [N' / 16, K' / G, G / 8, 64]. Byte 4 n + j of line i holds the features 8 i + j and
                                // 8 i + 4 + j of its group, the latter in the high nibble, for output feature n
  const uint16_t* scale_zero;   // bfloat16 [N' / 16, K' / G, 16, 2]: w = (q - 8) * scale + zero
  Rows dense;                   // [N, K] of the epilogue's dtype, in place of the 4-bit weights
  const int32_t* palette;       // of 12-bit weights, null otherwise; then `weight` is [N' / 4, K'' / 64,
                                // 6, 64], K'' of 64 features (bf12.h). 16 bytes, the number of each four's first patch
                                // [N' / 4 + 1], and the patches [2]: 4 k + n within the four, and the weight
  const uint8_t* exponents;     // [N, K / 32] of MXFP4 weights, null otherwise; then `weight` is [N, K / 32, 16]
                                // (mxfp4.h)
  const Pieces* unpacked;       // of `unpacked_bytes` or more, for 12-bit, MXFP4 and transposed weights
  const float* scale;           // [N, 1 or K / 32] of 8-bit weights, null otherwise; then `weight` is [N, K]
  const int64_t* expert;        // [M] which of `experts` stacked weights a row meets, null if there is one for all;
                                // a row with none of their numbers gets zeros. Biases, palettes and patches are
                                // stacked too; `x` is in int8 or rows, and `dense` one stack
  const int32_t* vocab_blocks;  // how many blocks of 16 output features to compute, and their numbers, ascending; the
                                // others become kMaskedLogit. Null: all are. For 4-bit weights, not gated, no residual
  int32_t rows, in_features, group_size, experts;
  int64_t side_each;           // int32s from one expert's palette to the next
  int32_t transposed;          // whether `dense` is one stack of [K, N]
  int32_t in_8_bits, grouped;  // kInt8s or kFloat8s, and whether every 32 input features have a scale; 0 otherwise
  Share only;                  // of its blocks of output features, those that a part computes; end 0: its share of all
  Epilogue epilogue;

  int64_t groups() const { return ceil_div(in_features, group_size); }
  int64_t padded_features() const { return groups() * group_size; }
  Share blocks_of(int part, int parts) const { return only.end ? only : share_of(epilogue.blocks(), part, parts); }
  bool is_unpacked() const { return palette || exponents || transposed; }
  // Two blocks of 16 output features in the dtype that meets the activations.
  int64_t two_blocks_bytes() const {
    const int64_t bytes = epilogue.dtype == kFloat32 ? 4 : 2;
    return 2 * bytes * kBlock * ceil_div(int64_t(in_features), kUnit) * kUnit;
  }
  // They, and behind them the sums of columns.
  int64_t unpacked_bytes() const {
    return two_blocks_bytes() + (transposed && epilogue.dtype == kBFloat16 ? kColumnBlocks * kColumnBytes : 0);
  }
};

constexpr float kMaskedLogit = -32768.0f;  // all dtypes have it, and masking logits further gives no NaN

// The epilogue of a matmul that a library computed: bias and weights are in `product` already. Parts split the rows.
struct LibraryEpilogueArgs {
  Rows product;  // matrices [M, N_i] of `dtype`, contiguous, side by side
  Epilogue epilogue;
  int32_t rows;
};

// Sorts what T tokens chose by expert; what chose none comes last. One part.
struct SortArgs {
  const int64_t* chosen;  // [R] the expert of each row
  int64_t* expert;        // [R] the same, ascending, -1 for none
  int32_t* order;         // [R] the row at each place
  int32_t* place;         // [R] the place of each row
  int32_t* starts;        // [experts + 2]
  int32_t rows, experts;
};

// y[m] = sum over j of weight[m, j] values[place[m each + j]] + residual[m]. Parts split groups of features.
struct CombineArgs {
  const void* values;    // [M each, N] of `dtype`
  const int32_t* place;  // [M each]
  const void* weight;    // [M, each] of `weight_dtype`
  Strided residual;      // [M, N] of `dtype`, or null
  void* y;               // [M, N] of `dtype`
  int32_t dtype, weight_dtype, rows, each, features;
};

constexpr int kMostExperts = 1024;
// Weights of the chosen: their softmax among all, that divided by its sum, or their softmax among themselves.
enum Routing : int32_t { kAmongAll = 0, kAmongAllNormalised = 1, kAmongChosen = 2 };

// The largest `each` of a row's logits, descending, the first of equal ones first. Parts split the rows.
struct RouteArgs {
  Strided logits;  // [M, experts] of `dtype`
  void* weight;    // [M, each] of `weight_dtype`
  int64_t* index;  // [M, each]
  int32_t dtype, weight_dtype, rows, experts, each, routing;
};

constexpr int kBlockOfLogits = 64;

// y = logits, the largest of each row recomputed as x W^T + bias. Parts split the `ways` shares of all rows.
struct RescoreArgs {
  Strided logits;      // [M, N] of `dtype`
  Activations x;       // in format kFloats, rows of `padded_features`
  const void* weight;  // [N, K] of `dtype`
  const void* bias;    // [N] of `dtype` or null
  void* y;             // [M, N] of `dtype`
  float* largest;      // for each part, twice as many as there are blocks of logits
  int32_t dtype, rows, in_features, padded_features, out_features, ways;
};

// A key-value cache [B, J, S, D], features contiguous.
struct Cache {
  char *keys, *values;
  int64_t sequence, head, slot;  // elements between two of each
};

// T positions of q|k|v, normalised and rotated, to q and slots of the cache (none outside). Parts split all heads. With
// `half_tables` the rotation's tables are [..., R / 2], with one angle for each pair.
struct KvFillArgs {
  Strided qkv;                               // [B T, (H + 2 J) D] of `dtype`
  const void *q_norm, *k_norm;               // [D] of `dtype`, null without a norm
  const void *cos, *sin;                     // [1 or B, T, R] of `rotary_dtype`, null without a rotation
  int64_t rotary_sequence, rotary_position;  // elements between two of each; 0 for one of all sequences
  const void* slot;                          // [T] of int64 or int32
  void* q;                                   // [B, T, H, D] of `dtype`
  Cache cache;
  int32_t dtype, rotary_dtype, slot_bytes, batch, positions, heads, kv_heads, head_dim, rotary_dim, slots, norm,
      interleaved, half_tables;
  float eps;
};

constexpr int kLargestGroup = 128;
constexpr int kMostHeadFeatures = 512;
constexpr int kQueries = 12;  // queries that meet the slots of a chunk together
constexpr int kChunk = 256;   // slots whose attention is summed before chunks are put together

// out = softmax(softcap(scale q k^T) + mask) v of each of T positions; causal: position t reads slots 0 to t; without a
// slot 0. A head's sink is the score of one more key, whose value is 0. Parts split groups of `together` positions,
// key-value heads and chunks; `combine` (parts: query heads) joins `partial` of several chunks.
struct AttentionArgs {
  const void* q;  // [B, T, H, D] of `dtype`
  Cache cache;
  const void* mask;                      // [B, T, S] of `mask_dtype`, or null
  int64_t mask_sequence, mask_position;  // elements between two of each; 0 for one of all
  const void* sinks;                     // [H] of `sinks_dtype`, or null
  void* out;                             // [B, T, H, D] of `dtype`
  float* partial;                        // [B, T, H, chunks, D + 2]: sum, maximum and denominator
  int32_t dtype, mask_dtype, sinks_dtype, batch, positions, heads, kv_heads, head_dim, slots, chunks, causal;
  int32_t together;  // with all heads that share a key-value head at most kQueries queries, or 1
  float scale, softcap;
};

constexpr int kPromptChunk = 64;  // slots that many positions meet at a time

// The same of many positions. Parts take blocks of positions, of one key-value head each, as long as there are any.
struct PromptArgs {
  AttentionArgs of;
  int64_t units;    // blocks of all sequences and heads
  uint64_t* taken;  // how many were taken by anyone, 0 at first
  char* scratch;    // [parts, scratch_bytes]
  int64_t scratch_bytes;
  int32_t block, together;  // positions of a block, a multiple of 16; query heads that are computed with one another
};

// Without scratch. Blocks depend on a model's heads alone: a row's bits must not depend on threads or other rows.
inline PromptArgs prompt_of(const AttentionArgs& of) {
  PromptArgs a{};
  a.of = of;
  const int32_t shared = of.heads / of.kv_heads, features = ceil_div(of.head_dim, kBlock) * kBlock;
  a.block = shared == 1 ? 48 : shared == 2 ? 32 : 16;
  a.together = shared < 8 ? shared : 8;
  a.units = int64_t(of.batch) * ceil_div(of.positions, a.block) * of.kv_heads * ceil_div(shared, a.together);
  const int64_t rows = int64_t(a.together) * a.block;
  const int64_t words = 2 * rows * (features + 1) + kPromptChunk * (2 * features + 3 * kBlock + a.block);
  a.scratch_bytes = ceil_div(words * 4 + of.slots, int64_t(64)) * 64;
  return a;
}

// score = least cosine of the rows of two matrices [M, D], NaN where a row is zero or not finite.
struct ScoreArgs {
  Strided hidden, previous;  // of `dtype`
  float* score;
  int32_t dtype, rows, features;
};

constexpr int kLogitsTogether = 2048;

// What logits [M, V] choose: the first of each row's largest ones, NaN above all, and the entropy of their distribution
// in nats, unless `only_largest`. Parts of `weigh` split rows and chunks; `choose` joins.
struct ChoiceArgs {
  const void* logits;  // of `dtype`
  int64_t stride;      // elements between two rows
  void* weighed;       // [M, chunks, 3] of float32
  double* choices;     // [M, 2], number and entropy, or null
  float* score;        // largest entropy, or null
  int32_t dtype, rows, logits_each, chunks;
  bool only_largest;
};

using Run = void (*)(const void* args, int part, int parts);

struct Phase {
  Run run;
  const void* args;
  int32_t parts;
};

// The phases of one instruction set.
struct Kernels {
  Run prepare;               // PrepareArgs
  Run gemm;                  // GemmArgs
  Run gemm_epilogue;         // LibraryEpilogueArgs
  Run kv_fill;               // KvFillArgs
  Run attend;                // AttentionArgs
  Run combine;               // AttentionArgs
  Run attend_prompt;         // PromptArgs
  Run rescore;               // RescoreArgs
  Run exit_score;            // ScoreArgs
  Run weigh;                 // ChoiceArgs
  Run choose;                // ChoiceArgs
  Run sort;                  // SortArgs
  Run combine_experts;       // CombineArgs
  Run route;                 // RouteArgs
  int32_t bfloat16;          // format of the activations that bfloat16 weights meet
  int32_t rows_of_bfloat16;  // the same where every row lies by itself
  bool vectors;              // whether matmuls of 16-bit weights and any number of rows are fast
};

}  // namespace river
