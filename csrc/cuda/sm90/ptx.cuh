// Hopper's own instructions, one per function: mbarrier, bulk tensor copies and wgmma.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/sm90/shared_memory.cuh"
#include "cuda/sm90/tensor_map.h"

// Only code for sm_90a may contain these instructions.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define TVMF_HOPPER
#endif

namespace tvmf::sm90 {

#ifndef TVMF_HOPPER
// Stands in for the body of a kernel that needs these instructions. The launch then ends with an
// error instead of a result that nobody has written.
__device__ __forceinline__ void no_such_instructions() {
#ifdef __CUDA_ARCH__
  asm volatile("trap;");
#endif
}
#endif

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes the initialised barriers visible to the copy engine. A __syncthreads must follow.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and adds to the bytes that must be copied before the phase ends.
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

// Starts the copy of the box at row `row` and column `col` to shared memory. Elements outside the
// matrix become zero. The bytes count towards the phase of `barrier`.
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

// A barrier of the 256 threads of the consumer warpgroups.
__device__ __forceinline__ void consumer_sync() {
  asm volatile("barrier.sync 1, 256;" ::: "memory");
}
// Raises or lowers the number of registers of each thread of the warpgroup.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Multiplies both numbers of a pair of bfloat16 by a power of two.
__device__ __forceinline__ uint32_t scale_bf16(uint32_t pair, bf16 power) {
  uint32_t out;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(pair), "r"(power.bits * 0x10001u));
  return out;
}

// Orders earlier writes of registers before the wgmma that read or accumulate into them.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending of the committed groups of wgmma are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads of the accumulators above the wait that precedes this call.
template <int kCount>
__device__ __forceinline__ void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// First the names of the accumulators' operands (%0, %1, ...), then the operands themselves.
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

// d = A B, or d += A B where `add`, with A [64, 16] and B [16, cols]. B lies in shared memory; A
// lies in registers (_registers) or in shared memory, too (_shared).
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

}  // namespace tvmf::sm90
