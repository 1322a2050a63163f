// The emulator's version of CUDA's header of this name: the built-in variables and functions that
// kernels use. simt.cmake includes it before every kernel's file, as nvcc does.
#pragma once

#include <math.h>

#include <algorithm>
#include <type_traits>

#include "simt.h"

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params),
                               const Params& params) {
  return simt::launch(kernel, config->gridDim, int(config->blockDim.x),
                      int(config->dynamicSmemBytes), config->stream, params);
}

__forceinline__ void __syncthreads() { simt::named_barrier(0, blockDim.x); }
__forceinline__ void __syncwarp(unsigned mask = ~0u) {
  simt::meet(simt::Collective::kSyncWarp, mask, {});
}
inline void __threadfence() { simt::fence_memory(); }

__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned out;
  simt::meet(simt::Collective::kBallot, mask, {nullptr, &out, predicate != 0, 0});
  return out;
}
__forceinline__ int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
__forceinline__ int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }

// `width` divides the warp into segments. A lane whose source lies outside its segment keeps its
// own value.
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = threadIdx.x % 32 & -width;
  return simt::shuffle(mask, value, first + (source & (width - 1)));
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = threadIdx.x % 32, source = lane ^ lanes;
  return simt::shuffle(mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = threadIdx.x % 32, source = lane + delta;
  return simt::shuffle(mask, value, source < (lane & -width) + width ? source : lane);
}

template <class T>
__forceinline__ T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "a float sum would depend on the order of threads");
  return simt::atomic(address, [=](T old) { return T(old + value); });
}
template <class T>
__forceinline__ T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T old) { return std::max(old, value); });
}
template <class T>
__forceinline__ T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T) { return value; });
}
template <class T>
__forceinline__ T atomicCAS(T* address, std::type_identity_t<T> expected,
                            std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T old) { return old == expected ? value : old; });
}
