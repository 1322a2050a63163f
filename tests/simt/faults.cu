// Kernels that test the emulator. Each is right, or contains one planted fault; test_faults.py
// lists the faults and the messages that must name them.
#include <map>
#include <stdexcept>

#include "cuda/ptx.cuh"
#include "faults.h"

namespace faults {
namespace {

__device__ float* shared() { return static_cast<float*>(simt::shared_memory()); }
__device__ const float* floats(const Case& c) { return static_cast<const float*>(c.x); }

// Sums x over the block by a tree. The fault omits barriers within a warp.
__global__ void block_sum(Case c) {
  float* sums = shared();
  const int t = threadIdx.x;
  sums[t] = floats(c)[t];
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (c.right || half > 16) __syncthreads();
    if (t < half) sums[t] += sums[t + half];
  }
  if (t == 0) c.y[0] = sums[0];
}

// The fault lets two threads write one word.
__global__ void write_word(Case c) {
  const int t = threadIdx.x;
  shared()[c.right ? t : t / 2] = t;
  __syncthreads();
  c.y[t] = shared()[t];
}

// Two threads may write the two halves of a word, but not one half.
__global__ void write_half_word(Case c) {
  const int t = threadIdx.x;
  uint16_t* halves = static_cast<uint16_t*>(simt::shared_memory());
  halves[c.right ? t : t / 2] = t;
  __syncthreads();
  c.y[t] = halves[t];
}

// __syncwarp orders accesses to memory; a shuffle does not.
__global__ void warp_exchange(Case c) {
  const int t = threadIdx.x;
  shared()[t] = floats(c)[t];
  if (c.right)
    __syncwarp();
  else
    __shfl_sync(~0u, t, 0);
  c.y[t] = shared()[t ^ 1];
}

// A thread's wait does not cover its neighbour's copy.
__global__ void async_neighbour(Case c) {
  const int t = threadIdx.x;
  tvmf::cp_async(shared() + 4 * t, floats(c) + 4 * t, 16);
  tvmf::cp_async_commit();
  tvmf::cp_async_wait<0>();
  if (c.right) __syncthreads();
  c.y[t] = shared()[4 * (t ^ 1)];
}

// The fault reads the destination before the copy has been waited for.
__global__ void async_without_wait(Case c) {
  const int t = threadIdx.x;
  tvmf::cp_async(shared() + 4 * t, floats(c) + 4 * t, 16);
  tvmf::cp_async_commit();
  if (c.right) tvmf::cp_async_wait<0>();
  __syncthreads();
  c.y[t] = shared()[4 * t];
}

// Two groups are in flight. The fault waits only for the first before it reads both.
__global__ void async_pending(Case c) {
  const int t = threadIdx.x;
  float* stage[2] = {shared() + 4 * t, shared() + 4 * (blockDim.x + t)};
  for (int i = 0; i < 2; ++i) {
    tvmf::cp_async(stage[i], floats(c) + 4 * (i * blockDim.x + t), 16);
    tvmf::cp_async_commit();
  }
  tvmf::cp_async_wait<1>();
  c.y[2 * t] = *stage[0];
  if (c.right)
    tvmf::cp_async_wait<0>();
  else
    tvmf::cp_async_wait<1>();
  c.y[2 * t + 1] = *stage[1];
}

// Copies the first `argument` bytes of 16; the others become 0.
__global__ void async_ragged(Case c) {
  const int t = threadIdx.x;
  tvmf::cp_async(shared() + 4 * t, c.x, c.argument);
  tvmf::cp_async_commit();
  tvmf::cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) c.y[4 * t + i] = shared()[4 * t + i];
}

__global__ void async_alignment(Case c) {
  tvmf::cp_async(shared() + 4 * threadIdx.x, floats(c) + (c.right ? 4 : 1), 16);
}

// The fault lets all blocks write one word.
__global__ void write_across_blocks(Case c) {
  if (threadIdx.x == 0) c.y[c.right ? blockIdx.x : 0] = blockIdx.x;
}

// The fault adds without an atomic.
__global__ void count_threads(Case c) {
  int* counter = reinterpret_cast<int*>(c.y);
  if (c.right)
    atomicAdd(counter, 1);
  else
    ++*counter;
}

// The last block adds up what all blocks have written. The faults leave out the first fence, the
// second one, or the barrier between the writes and the first fence (argument 0, 1 or 2).
__global__ void last_block(Case c) {
  const int t = threadIdx.x, fault = c.right ? -1 : c.argument, blocks = gridDim.x;
  int* counter = reinterpret_cast<int*>(c.y);  // -1, since all bits of new memory are set
  float* parts = c.y + 1;
  parts[blockIdx.x * blockDim.x + t] = floats(c)[t] + blockIdx.x;
  if (fault != 2) __syncthreads();
  int* last = static_cast<int*>(simt::shared_memory());
  if (t == 0) {
    if (fault != 0) __threadfence();
    *last = atomicAdd(counter, 1) == blocks - 2;
    if (fault != 1) __threadfence();
  }
  __syncthreads();
  if (!*last) return;
  float sum = 0;
  for (int block = 0; block < blocks; ++block) sum += parts[block * blockDim.x + t];
  parts[blocks * blockDim.x + t] = sum;
}

// The fault writes one word behind the end.
__global__ void shared_extent(Case c) {
  const int t = threadIdx.x;
  shared()[t + (c.right ? 0 : 1)] = t;
  c.y[t] = t;
}

// The fault reads one word behind the end.
__global__ void global_extent(Case c) {
  const int t = threadIdx.x;
  c.y[t] = floats(c)[t + (c.right ? 0 : 1)];
}

// The fault lets all but 16 threads exit without the barrier.
__global__ void deadlock(Case c) {
  if (c.right || threadIdx.x < 16) __syncthreads();
  c.y[threadIdx.x] = 1;
}

// The fault makes one half of the warp vote while the other half shuffles.
__global__ void divergent_collectives(Case c) {
  const int t = threadIdx.x;
  if (c.right || t < 16)
    c.y[t] = __shfl_sync(~0u, t, 0);
  else
    c.y[t] = __ballot_sync(~0u, 1);
}

// The fault lets a lane exit that the others shuffle with.
__global__ void early_exit(Case c) {
  const int t = threadIdx.x;
  if (!c.right && t == 7) return;
  c.y[t] = __shfl_xor_sync(~0u, t, 1);
}

// Each half of the block fills and reads its own part of shared memory and has its own barrier. The
// fault reads the other half's part.
__global__ void named_barriers(Case c) {
  const int t = threadIdx.x, members = blockDim.x / 2, half = t / members;
  shared()[t] = floats(c)[t];
  simt::named_barrier(1 + half, members);
  const int last = members - 1 - t % members;
  c.y[t] = shared()[last + members * (c.right ? half : 1 - half)];
}

// Writes the results of eight shuffles and votes.
__global__ void shuffles(Case c) {
  const int t = threadIdx.x, n = blockDim.x;
  const float v = floats(c)[t];
  c.y[t] = __shfl_xor_sync(~0u, v, 5);
  c.y[n + t] = __shfl_down_sync(~0u, v, 3);
  c.y[2 * n + t] = __shfl_sync(~0u, v, 3, 8);
  c.y[3 * n + t] = __shfl_xor_sync(~0u, double(v) + 1e-12, 16) == double(floats(c)[t ^ 16]) + 1e-12;
  c.y[4 * n + t] = __ballot_sync(~0u, v > 0) >> t % 32 & 1;
  c.y[5 * n + t] = __any_sync(~0u, v > 1e9f);
  c.y[6 * n + t] = __all_sync(~0u, v < 1e9f);
  c.y[7 * n + t] =
      __shfl_down_sync(t % 32 < 16 ? 0xffffu : 0xffff0000u, int64_t(t) << 40, 1, 16) >> 40;
}

// Writes each thread's place in the order of the atomics.
__global__ void arrival_order(Case c) {
  int* counter = static_cast<int*>(simt::shared_memory());
  if (threadIdx.x == 0) *counter = 0;
  __syncthreads();
  c.y[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

// Each lane reads a T, `argument` T's behind that of the lane before it.
template <class T>
__global__ void read_shared(Case c) {
  const T value = static_cast<const T*>(simt::shared_memory())[threadIdx.x * c.argument];
  reinterpret_cast<T*>(c.y)[threadIdx.x] = value;
}
template <class T>
__global__ void read_global(Case c) {
  const T value = static_cast<const T*>(c.x)[threadIdx.x * c.argument];
  reinterpret_cast<T*>(c.y)[threadIdx.x] = value;
}

// The fault moves lane 5's access by half of its size. The argument selects a read of global memory
// (0), a write to shared memory (1) or a read of shared memory (2).
template <class T>
__global__ void misaligned(Case c) {
  const bool half = !c.right && threadIdx.x == 5;
  char* const memory = c.argument ? static_cast<char*>(simt::shared_memory())
                                  : static_cast<char*>(const_cast<void*>(c.x));
  T* const there = reinterpret_cast<T*>(memory + threadIdx.x * 16 + half * sizeof(T) / 2);
  if (c.argument == 1)
    *there = T{};
  else
    reinterpret_cast<T*>(c.y)[threadIdx.x] = *there;
}

// Lane l goes l times round the loop.
__global__ void divergent_reads(Case c) {
  float sum = 0;
  for (unsigned i = 0; i < threadIdx.x; ++i) sum += floats(c)[i];
  c.y[threadIdx.x] = sum;
}

// Reads 8x8 matrices from rows of 128 bytes. With the swizzle no two rows of a matrix share a bank;
// the fault reads without it.
__global__ void read_matrices(Case c) {
  const int t = threadIdx.x, row = t % 8 + t / 8 * 8;
  uint32_t frag[4];
  const int chunk = c.right ? t % 8 : 0;
  tvmf::load_matrix_x4(frag, static_cast<tvmf::Bytes16*>(simt::shared_memory()) + row * 8 + chunk);
  c.y[t] = frag[0];
}

// y [16, 8] = 1 + A B^T, where x holds A [16, 16] and B [8, 16] of 16 bits, or A [16, 8] and B [8,
// 8] of tf32. The argument is the MmaKind, plus 4 where B is stored as [16, 8] and read transposed.
__global__ void matrix_product(Case c) {
  const int lane = threadIdx.x, kind = c.argument % 4;
  const bool transposed = c.argument >= 4;
  tvmf::Bytes16* chunks = static_cast<tvmf::Bytes16*>(simt::shared_memory());
  for (int i = lane; i < c.n / 16; i += 32) chunks[i] = static_cast<const tvmf::Bytes16*>(c.x)[i];
  __syncwarp();
  uint32_t a[4], b[4];
  tvmf::load_matrix_x4(a, chunks + lane % 16 * 2 + lane / 16);
  const int other = lane % 16;  // of the four matrices only two are used
  if (transposed)
    tvmf::load_matrix_x4_transposed(b, chunks + 32 + other);
  else
    tvmf::load_matrix_x4(b, chunks + 32 + other % 8 * 2 + other / 8);
  float d[4] = {1, 1, 1, 1};
  const uint32_t b01[2] = {b[0], b[1]};
  if (kind == simt::kBf16) tvmf::mma_bf16(d, a, b01);
  if (kind == simt::kF16) tvmf::mma_f16(d, a, b01);
  if (kind == simt::kTf32) tvmf::mma_tf32(d, a, b01);
  for (int i = 0; i < 4; ++i) c.y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// Per round two ldmatrix and eight mma, as in a main loop.
__global__ void many_products(Case c) {
  const int lane = threadIdx.x % 32;
  tvmf::Bytes16* chunks = static_cast<tvmf::Bytes16*>(simt::shared_memory());
  for (int i = threadIdx.x; i < 64; i += blockDim.x) chunks[i] = tvmf::Bytes16{};
  __syncthreads();
  float d[8][4] = {};
  for (int round = 0; round < c.argument; ++round) {
    uint32_t a[4], b[4];
    tvmf::load_matrix_x4(a, chunks + lane);
    tvmf::load_matrix_x4(b, chunks + 32 + lane);
    const uint32_t b01[2] = {b[0], b[1]};
    for (int i = 0; i < 8; ++i) tvmf::mma_bf16(d[i], a, b01);
  }
  for (int i = 0; i < 8; ++i) c.y[threadIdx.x * 8 + i] = d[i][0];
}

}  // namespace

void launch(const std::string& name, unsigned grid, int threads, int shared_bytes, const Case& c) {
#define ENTRY(kernel) \
  {                   \
    #kernel, kernel   \
  }
  static const std::map<std::string, void (*)(Case)> kernels = {
      ENTRY(block_sum),
      ENTRY(write_word),
      ENTRY(write_half_word),
      ENTRY(warp_exchange),
      ENTRY(async_neighbour),
      ENTRY(async_without_wait),
      ENTRY(async_pending),
      ENTRY(async_ragged),
      ENTRY(async_alignment),
      ENTRY(write_across_blocks),
      ENTRY(count_threads),
      ENTRY(last_block),
      ENTRY(shared_extent),
      ENTRY(global_extent),
      ENTRY(deadlock),
      ENTRY(divergent_collectives),
      ENTRY(early_exit),
      ENTRY(named_barriers),
      ENTRY(shuffles),
      ENTRY(arrival_order),
      ENTRY(divergent_reads),
      ENTRY(read_matrices),
      ENTRY(matrix_product),
      ENTRY(many_products),
      {"misaligned_4", misaligned<float>},
      {"misaligned_8", misaligned<uint64_t>},
      {"misaligned_16", misaligned<tvmf::Bytes16>},
      {"read_shared_4", read_shared<float>},
      {"read_shared_8", read_shared<uint64_t>},
      {"read_shared_16", read_shared<tvmf::Bytes16>},
      {"read_global_4", read_global<float>},
      {"read_global_16", read_global<tvmf::Bytes16>}};
#undef ENTRY
  const cudaError_t error =
      simt::launch(kernels.at(name), {grid, 1, 1}, threads, shared_bytes, nullptr, c);
  if (error != cudaSuccess) throw std::invalid_argument(cudaGetErrorString(error));
}

}  // namespace faults
