// The emulator's version of csrc/cuda/ptx.cuh, which describes the functions.
#pragma once

#include "cuda/access.cuh"

namespace tvmf {

inline float to_float(bf16 v) { return bits_as<float>(uint32_t(v.bits) << 16); }
inline float to_float(f16 v) { return float(bits_as<_Float16>(v.bits)); }
inline bf16 to_bf16(float v) {
  if (v != v) return {0x7fff};
  const uint32_t u = bits_as<uint32_t>(v);
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline f16 to_f16(float v) { return {bits_as<uint16_t>(_Float16(v))}; }
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
inline float fast_rsqrt(float v) { return 1 / __builtin_sqrtf(v); }
inline float multiply_add_unit(float a, float b, float c) {
  const float v = __builtin_fmaf(a, b, c);
  return v > 1 ? 1 : v > 0 ? v : 0;
}

__forceinline__ uint32_t shared_address(const void* smem) { return simt::shared_address(smem); }
__forceinline__ void load_matrix_x4(uint32_t (&frag)[4], const void* row_smem) {
  simt::meet(simt::Collective::kLoadMatrix, ~0u, {row_smem, frag, false, 0});
}
__forceinline__ void load_matrix_x4_transposed(uint32_t (&frag)[4], const void* row_smem) {
  simt::meet(simt::Collective::kLoadMatrix, ~0u, {row_smem, frag, true, 0});
}

#define TVMF_MMA(name, kind)                                                                 \
  __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    simt::meet(simt::Collective::kMma, ~0u, {a, d, kind, 0, b});                             \
  }
TVMF_MMA(mma_bf16, simt::kBf16)
TVMF_MMA(mma_f16, simt::kF16)
TVMF_MMA(mma_tf32, simt::kTf32)
#undef TVMF_MMA

inline void cp_async(void* smem, const void* global, int bytes) {
  simt::cp_async(smem, global, bytes);
}
inline void cp_async_or_zero(void* smem, const void* global, bool inside) {
  simt::cp_async(smem, global, inside ? 16 : 0);
}
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  simt::cp_async_wait(kPending);
}
inline void raise_flag(int* flag) { atomicExch(flag, 1); }

}  // namespace tvmf
