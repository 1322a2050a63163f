// Makes descriptions of matrices for Hopper's tensor copies. The driver makes them, in a function
// that is looked up at run time, so that the library loads where there is no driver.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "cuda/sm90/tensor_map.h"

namespace tvmf::sm90 {

namespace {

decltype(&cuTensorMapEncodeTiled) find_encode() {
  const char* name = "cuTensorMapEncodeTiled";
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

}  // namespace

cudaError_t make_tensor_map(TensorMap* map, const void* data, DType dtype, int64_t rows,
                            int64_t cols, int64_t row_stride, int box_rows, int box_cols) {
  static const auto encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  const auto type = dtype == DType::kFloat32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[2] = {cuuint64_t(cols), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(row_stride * size_of(dtype))};
  const cuuint32_t box[2] = {cuuint32_t(box_cols), cuuint32_t(box_rows)}, steps[2] = {1, 1};
  CUtensorMap made;  // its type brings the alignment that the toolkit's driver interface asks for
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
