// How a kernel is launched, and where its shared memory begins.
#pragma once

#include <cuda_runtime.h>

namespace tvmf {

// The block's dynamic shared memory. The kernels declare no other shared memory.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// Every launch goes through here. A kernel has one parameter, a struct.
template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                          cudaStream_t stream, const Params& params) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace tvmf
