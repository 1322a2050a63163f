// The emulator: runs CUDA kernels on a CPU. Every thread of a block is a fibre, blocks run one
// after another, and the last lane to arrive performs a warp's collective. The include path finds
// tests/simt/cuda_runtime.h and tests/simt/cuda/*.cuh before the files of the same names that a GPU
// needs; they call what this file declares.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <type_traits>
#include <vector>

namespace simt {

// The functions for the binding set options, make buffers and report what the launches did.

struct Options {
  uint64_t seed = 0;  // decides the order of blocks and of threads
  // Only the build whose accesses to memory are instrumented can do these two.
  bool check_races = true;
  bool count = true;
  // Without it launches are checked and counted, but no thread runs.
  bool execute = true;
};
void configure(const Options& options);

// A global buffer of exactly `bytes`, filled with NaN. It lives until release_all.
void* allocate(const std::string& name, size_t bytes);
void release_all();

// Calls of the CUDA runtime and driver since `reset`.
struct Calls {
  uint64_t launches = 0;
  uint64_t maps = 0;             // tensor maps that were encoded
  uint64_t attributes_set = 0;   // of kernels
  uint64_t attributes_read = 0;  // of the device
};
Calls calls();

// Counts of one kind of access by one line of a kernel.
struct SiteReport {
  std::string where, kind;  // "mainloop.cuh:80", "shared read"
  uint64_t requests = 0;    // instructions of a warp
  uint64_t bytes = 0;       // that the lanes asked for
  uint64_t sectors = 0;     // global memory: of 32 bytes, distinct within a request
  uint64_t wavefronts = 0;  // shared memory
  uint64_t conflicts = 0;   // shared memory: wavefronts that bank conflicts add
};
struct LaunchReport {
  std::string kernel;
  dim3 grid;
  int threads = 0, shared_bytes = 0;
  uint64_t global_read_bytes = 0, global_write_bytes = 0;
  uint64_t global_read_sectors = 0, global_write_sectors = 0;
  // Sectors distinct within the launch: the traffic to memory behind a perfect cache.
  uint64_t global_unique_read_sectors = 0, global_unique_write_sectors = 0;
  uint64_t shared_wavefronts = 0, bank_conflicts = 0;
  uint64_t mma = 0, load_matrix = 0, barriers = 0, atomics = 0;
  uint64_t wgmma = 0;                                 // instructions of a warpgroup
  uint64_t tensor_copies = 0, tensor_copy_bytes = 0;  // bytes written to shared memory
  std::vector<SiteReport> sites;
};
std::vector<LaunchReport> reports();
void reset();  // forgets the calls and the reports, and with them how many launches the seed has
               // ordered

// The functions for kernels are called by cuda_runtime.h and cuda/*.cuh.

// Instructions that the lanes of a warp execute together.
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

// A lane's operands of a collective.
struct Operand {
  const void* in;
  void* out;
  int argument;  // source lane, predicate, MmaKind, whether transposed, or groups left pending
  int bytes;     // size of a shuffled value
  const void* b = nullptr;
};
void meet(Collective what, unsigned mask, const Operand& operand);
void named_barrier(int id, int threads);
void* shared_memory();
void cp_async(void* smem, const void* global, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);
void note_atomic(const void* address, int bytes, const void* site);

// A lane's operands of wgmma. Each warp multiplies its own 16 of the 64 rows of A. `a` points to
// the lane's registers; it is null where A lies in shared memory.
struct Wgmma {
  MmaKind kind;
  int cols;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool transposed_a, transposed_b, add;
};
cudaError_t make_map(void* map, const void* data, int element_bytes, int64_t rows, int64_t cols,
                     int64_t row_stride, int box_rows, int box_cols);
uint32_t shared_address(const void* smem);
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int expected_bytes);
void barrier_wait(uint64_t* barrier, int parity);
void tensor_copy(void* smem, const void* map, int col, int row, uint64_t* barrier);
// __threadfence: what comes before it happens before what follows a fence of another thread, where
// an atomic between them comes before one at the same address there.
void fence_memory();
// Makes the thread's earlier writes to shared memory visible to wgmma and to tensor copies.
void fence_proxy();

template <class T>
__forceinline__ T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  T out;
  meet(Collective::kShuffle, mask, {&value, &out, source, sizeof(T)});
  return out;
}

// The return address is the place in the kernel that the reports name, so this is not inlined.
template <class T, class Change>
__attribute__((noinline, no_sanitize("thread"))) T atomic(T* address, Change change) {
  note_atomic(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = change(old);
  return old;
}

cudaError_t run(const void* kernel, const std::function<void()>& body, dim3 grid, int threads,
                int shared_bytes);

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t,
                   const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096);
  const auto body = [&] { kernel(params); };
  return run(reinterpret_cast<const void*>(kernel), body, grid, threads, shared_bytes);
}

}  // namespace simt
