// Where a block's shared memory begins.
#pragma once

namespace tvmf {

// The block's dynamic shared memory. The kernels declare no other shared memory.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

}  // namespace tvmf
