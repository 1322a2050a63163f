// The emulator's version of csrc/cuda/sm90/ptx.cuh, which describes the functions.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/sm90/shared_memory.cuh"
#include "cuda/sm90/tensor_map.h"

#define TVMF_HOPPER

namespace tvmf::sm90 {

__forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  simt::barrier_init(&barrier->state, arrivals);
}
__forceinline__ void barrier_init_fence() {}
__forceinline__ void barrier_arrive(Barrier* barrier) { simt::barrier_arrive(&barrier->state, 0); }
__forceinline__ void barrier_expect(Barrier* barrier, int bytes) {
  simt::barrier_arrive(&barrier->state, bytes);
}
__forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  simt::barrier_wait(&barrier->state, parity);
}
__forceinline__ void tensor_copy(void* smem, const TensorMap& map, int col, int row,
                                 Barrier* barrier) {
  simt::tensor_copy(smem, &map, col, row, &barrier->state);
}
__forceinline__ void prefetch_map(const TensorMap&) {}
__forceinline__ void consumer_sync() { simt::named_barrier(1, 256); }

// Registers are not emulated: a fibre has a stack.
template <int kCount>
__forceinline__ void take_registers() {}
template <int kCount>
__forceinline__ void give_registers() {}
template <int kCount>
__forceinline__ void hold(float (&)[kCount]) {}

__forceinline__ uint32_t scale_bf16(uint32_t pair, bf16 power) {
  const float low = to_float(bf16{uint16_t(pair)}), high = to_float(bf16{uint16_t(pair >> 16)});
  return pack_bf16(low * to_float(power), high * to_float(power));
}

__forceinline__ void wgmma_fence() { simt::meet(simt::Collective::kWgmmaFence, ~0u, {}); }
__forceinline__ void wgmma_commit() { simt::meet(simt::Collective::kWgmmaCommit, ~0u, {}); }
template <int kPending>
__forceinline__ void wgmma_wait() {
  simt::meet(simt::Collective::kWgmmaWait, ~0u, {nullptr, nullptr, kPending, 0});
}

#define TVMF_WGMMA(name, kind)                                                          \
  template <int kCount>                                                                 \
  __forceinline__ void wgmma_##name##_registers(float (&d)[kCount], const uint32_t* a,  \
                                                uint64_t b_descriptor, bool add) {      \
    static_assert(kCount == 64 || kCount == 128);                                       \
    const simt::Wgmma w{kind, 2 * kCount, a, 0, b_descriptor, false, false, add};       \
    simt::meet(simt::Collective::kWgmma, ~0u, {&w, d, 0, 0});                           \
  }                                                                                     \
  template <bool kTransposedA, bool kTransposedB, int kCount>                           \
  __forceinline__ void wgmma_##name##_shared(float (&d)[kCount], uint64_t a_descriptor, \
                                             uint64_t b_descriptor, bool add) {         \
    static_assert(kCount == 64 || kCount == 128);                                       \
    const simt::Wgmma w{kind,         2 * kCount,   nullptr,      a_descriptor,         \
                        b_descriptor, kTransposedA, kTransposedB, add};                 \
    simt::meet(simt::Collective::kWgmma, ~0u, {&w, d, 0, 0});                           \
  }
TVMF_WGMMA(bf16, simt::kBf16)
TVMF_WGMMA(f16, simt::kF16)
#undef TVMF_WGMMA

}  // namespace tvmf::sm90
