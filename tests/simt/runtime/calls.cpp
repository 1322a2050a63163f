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

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  ++simt::counted.attributes_read;
  *value = simt::kMaxShared;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  ++simt::counted.attributes_set;
  if (value < 0 || value > simt::kMaxShared) return cudaErrorInvalidValue;
  simt::limits()[kernel] = value;
  return cudaSuccess;
}
