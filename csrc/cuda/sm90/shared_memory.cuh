// Objects in shared memory that Hopper's instructions work on: mbarriers and wgmma's operands.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tvmf::sm90 {

// An mbarrier. Its phase ends when all expected threads have arrived and all expected bytes have
// been copied.
struct alignas(8) Barrier {
  uint64_t state;
};

// Describes an operand of wgmma: lines of 128 bytes, of which 8 make a swizzled atom of 1024 bytes.
// The next 8 lines follow 1024 bytes later. For transposed operands the next 64 elements in the
// lines' direction are `next_atom` bytes away.
__host__ __device__ constexpr uint64_t matrix_descriptor(uint32_t shared_address, int next_atom) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return uint64_t(shared_address >> 4 & 0x3fff) | uint64_t(next_atom >> 4) << 16 |
         uint64_t(1024 >> 4) << 32 | kSwizzle128;
}

}  // namespace tvmf::sm90
