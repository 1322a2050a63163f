// 16-bit floating-point numbers, and accesses to memory whose width the type decides.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace tvmf {

// The bits of 16-bit floating-point numbers. CUDA's own types would need its headers everywhere.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T, class U>
__device__ __forceinline__ T bits_as(U value) {
  static_assert(sizeof(T) == sizeof(U));
  T out;
  memcpy(&out, &value, sizeof(T));
  return out;
}

// The widest unit that one instruction loads or stores.
using Bytes16 = uint4;

// The type whose access is a single instruction of kBytes bytes.
template <int kBytes>
struct Access;
template <>
struct Access<16> {
  using Type = Bytes16;
};
template <>
struct Access<8> {
  using Type = uint64_t;
};
template <>
struct Access<4> {
  using Type = uint32_t;
};
template <>
struct Access<2> {
  using Type = uint16_t;
};

// Loads V by one instruction, or by several of 16 bytes if V is larger. The address must be a
// multiple of their width.
template <class V>
__device__ __forceinline__ V load_as(const void* from) {
  if constexpr (sizeof(V) > 16) {
    static_assert(sizeof(V) % 16 == 0);
    struct {
      Bytes16 part[sizeof(V) / 16];
    } parts;
#pragma unroll
    for (int i = 0; i < int(sizeof(V) / 16); ++i)
      parts.part[i] = static_cast<const Bytes16*>(from)[i];
    return bits_as<V>(parts);
  } else {
    return bits_as<V>(*static_cast<const typename Access<sizeof(V)>::Type*>(from));
  }
}
// Stores V, of at most 16 bytes, by one instruction.
template <class V>
__device__ __forceinline__ void store_as(void* to, const V& value) {
  using Type = typename Access<sizeof(V)>::Type;
  *static_cast<Type*>(to) = bits_as<Type>(value);
}

}  // namespace tvmf
