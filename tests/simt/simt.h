// The CUDA that the kernels use, on a CPU: every thread of a block is a fibre, blocks run in turn,
// and the last lane to arrive performs a warp's collective. simt.cpp is the runtime behind it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = struct CUstream_st*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
using std::max;
using std::min;

namespace simt {

// For the binding: options, buffers, and what the launches did.

struct Options {
  uint64_t seed = 0;        // orders blocks and threads; the same after a reset()
  bool check_races = true;  // these two need the instrumented build
  bool count = true;
};
void configure(const Options& options);

// A global buffer of exactly `bytes`, filled with NaN; it lives until release_all.
void* allocate(const std::string& name, size_t bytes);
void release_all();

struct SiteReport {
  std::string where, kind;  // "mainloop.cuh:80", "shared read"
  uint64_t requests = 0;    // warp instructions
  uint64_t bytes = 0;       // as the lanes asked
  uint64_t sectors = 0;     // global: of 32 bytes, distinct within a warp instruction
  uint64_t wavefronts = 0;  // shared
  uint64_t conflicts = 0;   // shared: wavefronts beyond the ideal
};
struct LaunchReport {
  std::string kernel;
  dim3 grid;
  int threads = 0, shared_bytes = 0;
  uint64_t global_read_bytes = 0, global_write_bytes = 0;
  uint64_t global_read_sectors = 0, global_write_sectors = 0;
  // Distinct over the launch: what a perfect cache would take from memory.
  uint64_t global_unique_read_sectors = 0, global_unique_write_sectors = 0;
  uint64_t shared_wavefronts = 0, bank_conflicts = 0;
  uint64_t mma = 0, load_matrix = 0, barriers = 0, atomics = 0;
  uint64_t wgmma = 0;                                 // of a warpgroup
  uint64_t tensor_copies = 0, tensor_copy_bytes = 0;  // bytes that fill shared memory
  std::vector<SiteReport> sites;
};
std::vector<LaunchReport> reports();
void reset();  // forgets the reports

// For the kernels: what ptx.cuh and the functions below are made of.

enum class Collective : uint8_t {
  kSyncWarp,
  kShuffle,
  kBallot,
  kLoadMatrix,
  kMma,
  kWgmma,
  kWgmmaFence,
  kWgmmaCommit,
  kWgmmaWait
};
enum MmaKind { kBf16, kF16, kTf32 };

struct Operand {
  const void* in;
  void* out;
  int argument;  // lane to read, predicate, transposed or MmaKind
  int bytes;     // of a shuffled value
  const void* b = nullptr;
};
void meet(Collective what, unsigned mask, const Operand& operand);
void named_barrier(int id, int threads);
void* shared_memory();
void cp_async(void* smem, const void* global, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);
void note_atomic(const void* address, int bytes, const void* site);
cudaError_t run(const void* kernel, const std::function<void()>& body, dim3 grid, int threads,
                int shared_bytes);

// For ptx_sm90.cuh, whose functions these are.

// What a lane gives to wgmma. Each warp multiplies its own 16 of the 64 rows: `a` are its
// registers, or null where A is in shared memory.
struct Wgmma {
  MmaKind kind;
  int cols;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool transposed_a, transposed_b, add;
};
// A CUtensorMap's 128 bytes.
struct MatrixMap {
  uint64_t magic;
  const char* data;
  int64_t rows, cols, row_bytes;
  int32_t element_bytes, box_rows;
  uint64_t padding[10];
};
cudaError_t make_map(void* map, const void* data, int element_bytes, int64_t rows, int64_t cols,
                     int64_t row_stride, int box_rows, int box_cols);
uint32_t shared_address(const void* smem);
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int expected_bytes);
void barrier_wait(uint64_t* barrier, int parity);
void tensor_copy(void* smem, const void* map, int col, int row, uint64_t* barrier);
// Makes what the thread wrote to shared memory known to wgmma and to copies.
void fence_proxy();

// Lane l gives row l % 8 of matrix l / 8 and gets word l % 4 of row l / 4 of each matrix.
__forceinline__ void load_matrix(uint32_t (&frag)[4], const void* row, bool transposed) {
  meet(Collective::kLoadMatrix, ~0u, {row, frag, transposed, 0});
}
__forceinline__ void mma(MmaKind kind, float (&d)[4], const uint32_t (&a)[4],
                         const uint32_t (&b)[2]) {
  meet(Collective::kMma, ~0u, {a, d, kind, 0, b});
}

template <class T>
__forceinline__ T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  T out;
  meet(Collective::kShuffle, mask, {&value, &out, source, sizeof(T)});
  return out;
}

template <class T, class Change>
__attribute__((noinline, no_sanitize("thread"))) T atomic(T* address, Change change) {
  note_atomic(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = change(old);
  return old;
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t,
                   const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096);
  const auto body = [&] { kernel(params); };
  return run(reinterpret_cast<const void*>(kernel), body, grid, threads, shared_bytes);
}

}  // namespace simt

__forceinline__ void __syncthreads() { simt::named_barrier(0, blockDim.x); }
__forceinline__ void __syncwarp(unsigned mask = ~0u) {
  simt::meet(simt::Collective::kSyncWarp, mask, {});
}
inline void __threadfence() {}

__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned out;
  simt::meet(simt::Collective::kBallot, mask, {nullptr, &out, predicate != 0, 0});
  return out;
}
__forceinline__ int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
__forceinline__ int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }

// `width` cuts the warp into segments; what lies outside the lane's own leaves its value.
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = threadIdx.x % 32 & -width;
  return simt::shuffle(mask, value, first + (source & (width - 1)));
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = threadIdx.x % 32, source = lane ^ lanes;
  return simt::shuffle(mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = threadIdx.x % 32, source = lane + delta;
  return simt::shuffle(mask, value, source < (lane & -width) + width ? source : lane);
}

template <class T>
__forceinline__ T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "a float sum would depend on the order of threads");
  return simt::atomic(address, [=](T old) { return T(old + value); });
}
template <class T>
__forceinline__ T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T old) { return std::max(old, value); });
}
template <class T>
__forceinline__ T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T) { return value; });
}
template <class T>
__forceinline__ T atomicCAS(T* address, std::type_identity_t<T> expected,
                            std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T old) { return old == expected ? value : old; });
}
