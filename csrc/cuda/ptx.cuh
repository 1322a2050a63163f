// Instructions for sm_80 and newer, one per function.
#pragma once

#include "cuda/access.cuh"

namespace tvmf {

__device__ __forceinline__ float to_float(bf16 v) {
  return __uint_as_float(uint32_t(v.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 v) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
}
// Conversions to 16 bits round to nearest even.
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
// Rounds to nearest, ties away from zero, and leaves 10 bits of mantissa.
__device__ __forceinline__ uint32_t to_tf32(uint32_t v) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(__uint_as_float(v)));
  return out;
}
// Two rounded numbers, the first in the low half.
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
// Approximates 2^v. Subnormal results become zero.
__device__ __forceinline__ float fast_exp2(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}
// Approximates 1 / sqrt(v), to two units in the last place.
__device__ __forceinline__ float fast_rsqrt(float v) {
  float out;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}
// a b + c, clamped to [0, 1] by the same instruction, which turns NaN into 0.
__device__ __forceinline__ float multiply_add_unit(float a, float b, float c) {
  float out;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(out) : "f"(a), "f"(b), "f"(c));
  return out;
}
// The address in the shared window, which the instructions below take.
__device__ __forceinline__ uint32_t shared_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}
// Loads four 8x8 matrices of 16-bit numbers. Lane l gives the address of row l % 8 of matrix l / 8,
// and gets word l % 4 of row l / 4 of each matrix.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&frag)[4], const void* row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
               : "r"(shared_address(row_smem))
               : "memory");
}
// Likewise, with rows and columns of each matrix exchanged.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&frag)[4],
                                                          const void* row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
               : "r"(shared_address(row_smem))
               : "memory");
}
// d += a b, of which every lane holds a fragment.
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

// Starts a copy to 16 bytes of shared memory. The first `bytes` come from global memory, and the
// others become zero.
__device__ __forceinline__ void cp_async(void* smem, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)),
               "l"(global), "r"(bytes)
               : "memory");
}
// The same for whole 16 bytes, which become zero where `inside` is false.
__device__ __forceinline__ void cp_async_or_zero(void* smem, const void* global, bool inside) {
  asm volatile(
      "{\n.reg .pred outside;\nsetp.eq.s32 outside, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, outside;\n}" ::"r"(shared_address(smem)),
      "l"(global), "r"(int(inside))
      : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
// Waits until at most kPending of the committed groups are on their way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Sets a flag that the host reads. Many threads may set it at once.
__device__ __forceinline__ void raise_flag(int* flag) {
  asm volatile("st.relaxed.sys.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}

}  // namespace tvmf
