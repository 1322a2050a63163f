// The emulator's version of csrc/cuda/launch.cuh.
#pragma once

#include "simt.h"

namespace tvmf {

__forceinline__ void* shared_memory() { return simt::shared_memory(); }

template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                          cudaStream_t stream, const Params& params) {
  return simt::launch(kernel, grid, threads, shared_bytes, stream, params);
}

}  // namespace tvmf
