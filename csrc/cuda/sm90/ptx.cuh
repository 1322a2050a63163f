// Hopper's own instructions, one per function: mbarrier, bulk tensor copies and wgmma. Under the
// SIMT emulator (tests/simt) the same names run on the CPU.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/sm90/tensor_map.h"

// Code of these instructions is only made for the chip that has them.
#if defined(TVMF_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TVMF_HOPPER
#endif

namespace tvmf::sm90 {

// Phases of arrivals and of bytes to come, in shared memory.
struct alignas(8) Barrier {
  uint64_t state;
};

// A tile in shared memory as wgmma reads it: lines of 128 bytes, 8 of them a swizzled atom. Along
// the lines' direction the next 64 elements are `next_atom` bytes away (transposed operands only),
// across it the next 8 lines are 1024.
__host__ __device__ constexpr uint64_t matrix_descriptor(uint32_t shared_address, int next_atom) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return uint64_t(shared_address >> 4 & 0x3fff) | uint64_t(next_atom >> 4) << 16 |
         uint64_t(1024 >> 4) << 32 | kSwizzle128;
}

#ifndef TVMF_HOPPER
// In place of a kernel of them: an error at the launch's end, and not a result that nobody wrote.
__device__ __forceinline__ void no_such_instructions() {
#ifdef __CUDA_ARCH__
  asm volatile("trap;");
#endif
}
#endif

#ifdef TVMF_SIMT

__forceinline__ uint32_t shared_address(const void* smem) { return simt::shared_address(smem); }
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
__forceinline__ float clamp_unit(float v) { return v > 1 ? 1 : v < -1 ? -1 : v; }
__forceinline__ void prefetch_map(const TensorMap&) {}
__forceinline__ void consumer_sync() { simt::named_barrier(1, 256); }

template <int kCount>
__forceinline__ void take_registers() {}
template <int kCount>
__forceinline__ void give_registers() {}

__forceinline__ void wgmma_fence() { simt::meet(simt::Collective::kWgmmaFence, ~0u, {}); }
__forceinline__ void wgmma_commit() { simt::meet(simt::Collective::kWgmmaCommit, ~0u, {}); }
template <int kPending>
__forceinline__ void wgmma_wait() {
  simt::meet(simt::Collective::kWgmmaWait, ~0u, {nullptr, nullptr, kPending, 0});
}

template <int kCount>
__forceinline__ void hold(float (&)[kCount]) {}

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

#else  // the device

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes the initialised barriers known to the copy engine; a block barrier must follow.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and lets the phase end only when so many bytes have been copied.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A box of the matrix at element `col` of line `row` to shared memory; what is outside is 0.
__device__ __forceinline__ void tensor_copy(void* smem, const TensorMap& map, int col, int row,
                                            Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(smem)),
      "l"(&map), "r"(col), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The 256 threads of the consumer warpgroups.
__device__ __forceinline__ void consumer_sync() {
  asm volatile("barrier.sync 1, 256;" ::: "memory");
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// To [-1, 1] in two instructions; NaN stays.
__device__ __forceinline__ float clamp_unit(float v) {
  asm("min.NaN.f32 %0, %0, 0f3f800000;" : "+f"(v));
  asm("max.NaN.f32 %0, %0, 0fbf800000;" : "+f"(v));
  return v;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler may not move what uses the accumulators above the wait before this.
template <int kCount>
__device__ __forceinline__ void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Registers' names in the order of operands: %0, ... , then the operands themselves.
#define TVMF_TEN(t)                                                                                \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9, "
#define TVMF_SIXTY TVMF_TEN() TVMF_TEN(1) TVMF_TEN(2) TVMF_TEN(3) TVMF_TEN(4) TVMF_TEN(5)
#define TVMF_NAMES_64 TVMF_SIXTY "%60, %61, %62, %63"
#define TVMF_NAMES_128                                                    \
  TVMF_SIXTY TVMF_TEN(6) TVMF_TEN(7) TVMF_TEN(8) TVMF_TEN(9) TVMF_TEN(10) \
      TVMF_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define TVMF_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TVMF_D16(i) TVMF_D4(i), TVMF_D4(i + 4), TVMF_D4(i + 8), TVMF_D4(i + 12)
#define TVMF_D64(i) TVMF_D16(i), TVMF_D16(i + 16), TVMF_D16(i + 32), TVMF_D16(i + 48)
#define TVMF_D_64 TVMF_D64(0)
#define TVMF_D_128 TVMF_D64(0), TVMF_D64(64)

#define TVMF_WGMMA(cols, count, type, a0, a1, a2, a3, a4, a5)                                     \
  __device__ __forceinline__ void wgmma_##type##_registers(float (&d)[count], const uint32_t* a,  \
                                                           uint64_t b_descriptor, bool add) {     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #a5                                     \
                 ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #cols "k16.f32." #type "." #type             \
                 " {" TVMF_NAMES_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #a4     \
                                         ", add, 1, 1, 0;\n}"                                     \
                 : TVMF_D_##count                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(int(add))); \
  }                                                                                               \
  template <bool kTransposedA, bool kTransposedB>                                                 \
  __device__ __forceinline__ void wgmma_##type##_shared(float (&d)[count], uint64_t a_descriptor, \
                                                        uint64_t b_descriptor, bool add) {        \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #a4                                     \
                 ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #cols "k16.f32." #type "." #type             \
                 " {" TVMF_NAMES_##count "}, %" #a0 ", %" #a1 ", add, 1, 1, %" #a2 ", %" #a3      \
                                         ";\n}"                                                   \
                 : TVMF_D_##count                                                                 \
                 : "l"(a_descriptor), "l"(b_descriptor), "n"(int(kTransposedA)),                  \
                   "n"(int(kTransposedB)), "r"(int(add)));                                        \
  }
TVMF_WGMMA(256, 128, bf16, 128, 129, 130, 131, 132, 133)
TVMF_WGMMA(128, 64, bf16, 64, 65, 66, 67, 68, 69)
TVMF_WGMMA(256, 128, f16, 128, 129, 130, 131, 132, 133)
TVMF_WGMMA(128, 64, f16, 64, 65, 66, 67, 68, 69)
#undef TVMF_WGMMA
#undef TVMF_TEN
#undef TVMF_SIXTY
#undef TVMF_NAMES_64
#undef TVMF_NAMES_128
#undef TVMF_D4
#undef TVMF_D16
#undef TVMF_D64
#undef TVMF_D_64
#undef TVMF_D_128

#endif

}  // namespace tvmf::sm90
