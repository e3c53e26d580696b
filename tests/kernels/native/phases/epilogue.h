// What follows the sums of a matmul: drawn for a case, and checked.
#pragma once

#include "activations.h"

namespace river::checks {

// Sums [M, N], and the magnitudes that they were added up from.
struct Sums {
  Doubles values, magnitudes;
};

// What an epilogue may have.
struct Around {
  bool gate = true, residual = true, bias = true, pairs = false;
};

// Draws the rest of an epilogue of which dtype and out_features are set; `first`: where matrices begin, and their end.
void draw_epilogue(Case& c, Epilogue& e, int rows, const std::vector<int32_t>& first, const Around& may = {});

// Draws where up to four matrices of `out_features` rows begin, and their end.
std::vector<int32_t> draw_matrices(Case& c, int out_features);

// Compares y with the epilogue of sums.
void expect_epilogue(Case& c, const Epilogue& e, int rows, const Sums& sums);

}  // namespace river::checks
