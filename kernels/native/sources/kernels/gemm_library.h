// The epilogue of a matmul of many rows, which a library computed.
#pragma once

#include <algorithm>

#include "kernels/epilogue.h"

namespace river {

// Reads features first..first + count - 1 of a row of matrices that lie side by side.
inline void load_columns(const Rows& product, int64_t row, int64_t first, int count, int32_t dtype, float* values) {
  for (int done = 0; done < count;) {
    const int matrix = matrix_of(product, first + done);
    const int64_t begin = product.first[matrix], width = product.first[matrix + 1] - begin;
    const int64_t at = first + done - begin;
    const int here = int(std::min<int64_t>(count - done, width - at));
    load_values(product.data[matrix], row * width + at, here, dtype, values + done);
    done += here;
  }
}

inline void gemm_epilogue(const void* args, int part, int parts) {
  const auto& a = *static_cast<const LibraryEpilogueArgs*>(args);
  const Epilogue& e = a.epilogue;
  constexpr int kColumns = 512;
  alignas(64) float y[kColumns], up[kColumns];
  for (auto [row, end] = share_of(a.rows, part, parts); row < end; ++row)
    for (int64_t first = 0; first < e.width(); first += kColumns) {
      const int count = int(std::min<int64_t>(kColumns, e.width() - first));
      load_columns(a.product, row, first, count, e.dtype, y);
      if (e.gated) load_columns(a.product, row, e.width() + first, count, e.dtype, up);
      epilogue<kColumns>(e, first, int(row), 1, y, up);
    }
}

}  // namespace river
