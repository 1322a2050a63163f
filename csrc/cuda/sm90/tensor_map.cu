// Descriptions of matrices for Hopper's bulk copies, made by the driver, which is found at run
// time.
#include <cuda.h>

#include <cstring>

#include "cuda/sm90/tensor_map.h"

namespace tvmf::sm90 {

cudaError_t make_tensor_map(TensorMap* map, const void* data, DType dtype, int64_t rows,
                            int64_t cols, int64_t row_stride, int box_rows, int box_cols) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
               : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  const auto type = dtype == DType::kFloat32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[2] = {cuuint64_t(cols), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(row_stride * size_of(dtype))};
  const cuuint32_t box[2] = {cuuint32_t(box_cols), cuuint32_t(box_rows)}, steps[2] = {1, 1};
  alignas(64) CUtensorMap made;
  static_assert(sizeof(made) == sizeof(*map));
  const CUresult result =
      encode(&made, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  std::memcpy(map, &made, sizeof(made));
  return cudaSuccess;
}

}  // namespace tvmf::sm90
