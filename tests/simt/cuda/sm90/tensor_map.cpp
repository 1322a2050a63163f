// The emulator's version of csrc/cuda/sm90/tensor_map.cu.
#include "cuda/sm90/tensor_map.h"

#include "simt.h"

namespace tvmf::sm90 {

cudaError_t make_tensor_map(TensorMap* map, const void* data, DType dtype, int64_t rows,
                            int64_t cols, int64_t row_stride, int box_rows, int box_cols) {
  return simt::make_map(map, data, int(size_of(dtype)), rows, cols, row_stride, box_rows, box_cols);
}

}  // namespace tvmf::sm90
