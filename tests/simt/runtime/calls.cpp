// The calls of the CUDA runtime that host code makes beside launches, and their counts.
#include <map>

#include "internal.h"

namespace simt {

Calls counted;
Calls calls() { return counted; }

// Bytes of shared memory that the blocks of a kernel may have without asking for more.
constexpr int kUnasked = 48 * 1024;

static std::map<const void*, int>& limits() {
  static std::map<const void*, int> limits;
  return limits;
}
bool may_have(const void* kernel, int shared_bytes) {
  const auto found = limits().find(kernel);
  return shared_bytes <= (found == limits().end() ? kUnasked : found->second);
}

}  // namespace simt

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"Emulated H200"};
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  ++simt::counted.attributes_read;
  switch (which) {
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrL2CacheSize: *value = 60 << 20; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = simt::kMaxShared + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = simt::kMaxShared; break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  ++simt::counted.attributes_set;
  if (value < 0 || value > simt::kMaxShared) return cudaErrorInvalidValue;
  simt::limits()[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = simt::allocate("host memory", bytes);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** there, void* here, unsigned) {
  *there = here;
  return cudaSuccess;
}
