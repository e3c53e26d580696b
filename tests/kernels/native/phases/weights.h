// Random weights in every form that a matmul takes, packed as phases.h and bf12.h say.
#pragma once

#include "harness.h"

namespace river::checks {

// What a row's activations meet, [N, K]: rounded to 8 bits `steps` if there are any, as they are `values`.
struct Weights {
  Doubles values, steps;
};

// Stacked 4-bit weights; those of experts that `used` lacks have scales of NaN.
std::vector<Weights> pack_int4(Case& c, GemmArgs& a, const std::vector<bool>& used);
// Stacked matrices of the epilogue's dtype; those of experts that `used` lacks are NaN.
std::vector<Weights> pack_dense_experts(Case& c, GemmArgs& a, const std::vector<bool>& used);
// Up to four matrices of the epilogue's dtype, which begin at `first`.
Weights pack_dense(Case& c, GemmArgs& a, const std::vector<int32_t>& first);
// Stacked bfloat16 in 12 bits, a share of them patches, without those that `used` lacks; `dense` becomes the same in
// 16 bits.
std::vector<Weights> pack_12_bits(Case& c, GemmArgs& a, const std::vector<bool>& used, Rows& dense);
// Stacked MXFP4, those that `used` lacks with scales of NaN; and as `pack_dense_experts`, stored as [K, N]. `dense`
// becomes the same in rows.
std::vector<Weights> pack_mxfp4(Case& c, GemmArgs& a, const std::vector<bool>& used, Rows& dense);
std::vector<Weights> pack_transposed(Case& c, GemmArgs& a, const std::vector<bool>& used, Rows& dense);
// Integers with a scale for each row or every 32 features, or floats with one for each row.
Weights pack_8_bits(Case& c, GemmArgs& a);

}  // namespace river::checks
