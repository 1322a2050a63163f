// One instruction per function. Under the SIMT emulator (tests/simt) the same names run on the CPU.
#pragma once

#include <cstdint>

#ifdef TVMF_SIMT
#include <math.h>

#include "simt.h"
#else
#include <cuda_runtime.h>
#endif

namespace tvmf {

// 16-bit floating-point numbers as their bits: no header of CUDA's is needed to pass them around.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#ifdef TVMF_SIMT

template <class T>
T bits_as(auto value) {
  static_assert(sizeof(T) == sizeof(value));
  T out;
  __builtin_memcpy(&out, &value, sizeof(T));
  return out;
}

// The widest unit of access. A vector, so that no compiler takes it apart.
using Bytes16 = uint32_t __attribute__((vector_size(16)));

inline float to_float(bf16 v) { return bits_as<float>(uint32_t(v.bits) << 16); }
inline float to_float(f16 v) { return float(bits_as<_Float16>(v.bits)); }
// Round to nearest even; NaN stays NaN.
inline bf16 to_bf16(float v) {
  if (v != v) return {0x7fff};
  const uint32_t u = bits_as<uint32_t>(v);
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline f16 to_f16(float v) { return {bits_as<uint16_t>(_Float16(v))}; }
// Round to nearest, ties away: 10 bits of mantissa.
inline uint32_t to_tf32(uint32_t v) {
  return (v & 0x7f800000) == 0x7f800000 ? v : (v + 0x1000) & ~0x1fffu;
}
inline uint32_t pack_bf16(float low, float high) {
  return to_bf16(low).bits | uint32_t(to_bf16(high).bits) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return to_f16(low).bits | uint32_t(to_f16(high).bits) << 16;
}
inline float fast_exp2(float v) { return __builtin_exp2f(v); }

// The lane's row of an 8x8 matrix of 16-bit numbers; see simt.h for the fragment it gets.
inline void load_matrix_x4(uint32_t (&frag)[4], const void* row_smem) {
  simt::load_matrix(frag, row_smem, false);
}
inline void load_matrix_x4_transposed(uint32_t (&frag)[4], const void* row_smem) {
  simt::load_matrix(frag, row_smem, true);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma(simt::kBf16, d, a, b);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma(simt::kF16, d, a, b);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma(simt::kTf32, d, a, b);
}
// 16 bytes to shared memory, of which the first `bytes` come from global memory; the rest is 0.
inline void cp_async(void* smem, const void* global, int bytes) {
  simt::cp_async(smem, global, bytes);
}
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  simt::cp_async_wait(kPending);
}
inline void raise_flag(int* flag) { atomicExch(flag, 1); }

#else  // the device

template <class T, class U>
__device__ __forceinline__ T bits_as(U value) {
  static_assert(sizeof(T) == sizeof(U));
  T out;
  memcpy(&out, &value, sizeof(T));
  return out;
}

using Bytes16 = uint4;

__device__ __forceinline__ float to_float(bf16 v) {
  return __uint_as_float(uint32_t(v.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 v) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
}
__device__ __forceinline__ bf16 to_bf16(float v) {
  bf16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
  return out;
}
__device__ __forceinline__ f16 to_f16(float v) {
  f16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
  return out;
}
__device__ __forceinline__ uint32_t to_tf32(uint32_t v) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(__uint_as_float(v)));
  return out;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ float fast_exp2(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}
__device__ __forceinline__ uint32_t shared_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}
__device__ __forceinline__ void load_matrix_x4(uint32_t (&frag)[4], const void* row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
               : "r"(shared_address(row_smem))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&frag)[4],
                                                          const void* row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
               : "r"(shared_address(row_smem))
               : "memory");
}
#define TVMF_MMA(name, shape, type)                                                     \
  __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4],           \
                                       const uint32_t (&b)[2]) {                        \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));   \
  }
TVMF_MMA(mma_bf16, "m16n8k16", "bf16")
TVMF_MMA(mma_f16, "m16n8k16", "f16")
TVMF_MMA(mma_tf32, "m16n8k8", "tf32")
#undef TVMF_MMA

__device__ __forceinline__ void cp_async(void* smem, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Many threads may; the host reads it.
__device__ __forceinline__ void raise_flag(int* flag) {
  asm volatile("st.relaxed.sys.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}

#endif

// One access of 16, 8, 4 or 2 bytes, or for a larger aligned struct a few of 16.
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
template <class V>
__device__ __forceinline__ void store_as(void* to, const V& value) {
  using Type = typename Access<sizeof(V)>::Type;
  *static_cast<Type*>(to) = bits_as<Type>(value);
}

}  // namespace tvmf
