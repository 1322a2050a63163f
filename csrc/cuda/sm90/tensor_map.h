// Descriptions of matrices in global memory, from which tensor copies (TMA) take boxes.
#pragma once

#include "cuda/head.h"

namespace tvmf::sm90 {

// A CUtensorMap, whose contents only the driver and the copy engine know.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// Describes the matrix [rows, cols] for copies of boxes of box_rows lines. A line of a box has
// box_cols elements, which must be 128 bytes. Elements outside the matrix read as 0.
cudaError_t make_tensor_map(TensorMap* map, const void* data, DType dtype, int64_t rows,
                            int64_t cols, int64_t row_stride, int box_rows, int box_cols);

}  // namespace tvmf::sm90
