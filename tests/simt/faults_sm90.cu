// Kernels that test the emulator's mbarriers, tensor copies and wgmma. Each is right, or contains a
// planted fault; test_faults_sm90.py lists the faults and the messages that must name them.
#include <map>
#include <stdexcept>

#include "cuda/sm90/ptx.cuh"
#include "faults.h"

namespace faults {
namespace {

using namespace tvmf;
using namespace tvmf::sm90;

struct Params {
  CaseSm90 c;
  TensorMap a, b;
};

__device__ unsigned char* shared() { return static_cast<unsigned char*>(simt::shared_memory()); }

constexpr int kBox = 8192;  // bytes of a box of 64 lines

// Copies the words of a box to y. Argument 0 is its column, argument 1 its row. The fault reads
// without waiting for the copy.
__global__ void copy_box(const __grid_constant__ Params p) {
  const int words = p.c.a.box_rows * 32;
  Barrier* full = reinterpret_cast<Barrier*>(shared() + words * 4);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(full, words * 4);
    tensor_copy(shared(), p.a, p.c.argument[0], p.c.argument[1], full);
  }
  if (p.c.right) barrier_wait(full, 0);
  for (int i = threadIdx.x; i < words; i += blockDim.x)
    p.c.y[i] = reinterpret_cast<const float*>(shared())[i];
}

// The fault copies to an address that is no multiple of 1024.
__global__ void copy_alignment(const __grid_constant__ Params p) {
  Barrier* full = reinterpret_cast<Barrier*>(shared() + 2 * kBox);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_expect(full, kBox);
    tensor_copy(shared() + (p.c.right ? 1024 : 512), p.a, 0, 0, full);
    barrier_wait(full, 0);
  }
}

// Sums the columns of a over the block's 64 rows. The last warp copies boxes of 64 x 32 floats
// through three stages, and the other warps consume them.
constexpr int kStages = 3;
struct Ring {
  Barrier full[kStages], empty[kStages];
};
enum RingFault { kNone, kReleaseEarly, kNoEmpty, kNoFull, kFewArrivals, kManyBytes, kFewBytes };
__global__ void ring(const __grid_constant__ Params p) {
  Ring& r = *reinterpret_cast<Ring*>(shared() + kStages * kBox);
  const int fault = p.c.right ? kNone : p.c.argument[0], warps = blockDim.x / 32 - 1;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&r.full[i], 1);
      barrier_init(&r.empty[i], fault == kFewArrivals ? warps + 1 : warps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const int steps = int((p.c.a.cols + 31) / 32), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int stage = 0, parity = 0;
  float sum[2] = {};
  for (int step = 0; step < steps; ++step) {
    if (warp == warps) {
      if (lane == 0) {
        if (fault != kNoEmpty) barrier_wait(&r.empty[stage], parity ^ 1);
        barrier_expect(&r.full[stage], fault == kManyBytes  ? 2 * kBox
                                       : fault == kFewBytes ? kBox / 2
                                                            : kBox);
        tensor_copy(shared() + stage * kBox, p.a, step * 32, blockIdx.x * 64, &r.full[stage]);
      }
    } else {
      if (fault != kNoFull) barrier_wait(&r.full[stage], parity);
      if (fault == kReleaseEarly) {
        __syncwarp();
        if (lane == 0) barrier_arrive(&r.empty[stage]);
      }
      for (int row = warp; row < 64; row += warps)
        sum[step % 2] += reinterpret_cast<const float*>(
            shared() + stage * kBox)[row * 32 + ((lane / 4 ^ row % 8) * 4 | lane % 4)];
      if (fault != kReleaseEarly) {
        __syncwarp();
        if (lane == 0) barrier_arrive(&r.empty[stage]);
      }
    }
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  if (warp < warps) p.c.y[blockIdx.x * warps * 32 + threadIdx.x] = sum[0] + sum[1];
}

// y [64, kCols] = A B^T over a depth of 64, plus 1 where argument 1 is set. A transposed operand
// lies in boxes of 64 of its lines. Argument 0 selects the fault: 1 omits the wait for wgmma, 2
// reads the accumulators before the wait, 3 omits the fence for registers, 4 omits the wait for the
// operands, 5 lets one warp issue one wgmma less.
template <bool kF16, bool kRegisters, bool kTransposedA, bool kTransposedB, int kCols>
__global__ void product(const __grid_constant__ Params p) {
  const int fault = p.c.right ? 0 : p.c.argument[0];
  unsigned char *a = shared(), *b = shared() + kBox;
  Barrier* full = reinterpret_cast<Barrier*>(b + kCols * 128);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(full, kBox + kCols * 128);
    tensor_copy(a, p.a, 0, 0, full);
    for (int i = 0; i < kCols / 64; ++i)
      tensor_copy(b + i * kBox, p.b, kTransposedB ? i * 64 : 0, kTransposedB ? 0 : i * 64, full);
  }
  if (fault != 4) barrier_wait(full, 0);
  const int lane = threadIdx.x % 32, line = threadIdx.x / 32 * 16 + lane / 4;
  float d[kCols / 2];
  for (float& v : d) v = 1;
  uint32_t frag[4][4];
  if (kRegisters)
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < 4; ++i) {
        const int row = line + i % 2 * 8, chunk = k * 2 + i / 2;
        frag[k][i] = load_as<uint32_t>(a + row * 128 + (chunk ^ row % 8) * 16 + lane % 4 * 4);
      }
  if (fault != 3) wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    if (fault == 5 && threadIdx.x / 32 == 2 && k == 3) break;
    const uint64_t a_at =
        matrix_descriptor(shared_address(a) + k * (kTransposedA ? 2048 : 32), kBox);
    const uint64_t b_at =
        matrix_descriptor(shared_address(b) + k * (kTransposedB ? 2048 : 32), kBox);
    const bool add = p.c.argument[1] || k > 0;
    if constexpr (kRegisters && kF16) wgmma_f16_registers(d, frag[k], b_at, add);
    if constexpr (kRegisters && !kF16) wgmma_bf16_registers(d, frag[k], b_at, add);
    if constexpr (!kRegisters && kF16)
      wgmma_f16_shared<kTransposedA, kTransposedB>(d, a_at, b_at, add);
    if constexpr (!kRegisters && !kF16)
      wgmma_bf16_shared<kTransposedA, kTransposedB>(d, a_at, b_at, add);
  }
  wgmma_commit();
  if (fault == 2)
    wgmma_wait<1>();
  else if (fault != 1)
    wgmma_wait<0>();
  for (int i = 0; i < kCols / 2; ++i)
    p.c.y[(line + i % 4 / 2 * 8) * kCols + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
  if (fault == 2) wgmma_wait<0>();
}

// The fault gives a stage back to the copying thread while wgmma reads it.
__global__ void early_release(const __grid_constant__ Params p) {
  unsigned char *a = shared(), *b = shared() + kBox;
  Barrier* full = reinterpret_cast<Barrier*>(b + 128 * 128);
  Barrier* empty = full + 1;
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(empty, 4);
    barrier_init_fence();
  }
  __syncthreads();
  float d[64];
  if (threadIdx.x < 128) {
    for (int step = 0; step < 2; ++step) {
      barrier_wait(full, step);
      wgmma_fence();
      wgmma_bf16_shared<false, false>(d, matrix_descriptor(shared_address(a), kBox),
                                      matrix_descriptor(shared_address(b), kBox), step > 0);
      wgmma_commit();
      if (p.c.right) wgmma_wait<0>();
      if (threadIdx.x % 32 == 0) barrier_arrive(empty);
      if (!p.c.right) wgmma_wait<0>();
    }
    for (int i = 0; i < 64; ++i) p.c.y[threadIdx.x * 64 + i] = d[i];
  } else if (threadIdx.x == 128) {
    for (int step = 0; step < 2; ++step) {
      barrier_wait(empty, step ^ 1);
      barrier_expect(full, 3 * kBox);
      tensor_copy(a, p.a, 0, 0, full);
      for (int i = 0; i < 2; ++i) tensor_copy(b + i * kBox, p.b, 0, i * 64, full);
    }
  }
}

// Threads write the operands themselves. The fault omits the fence before the barrier; with
// argument 0 set, it fences behind the barrier.
__global__ void written_operand(const __grid_constant__ Params p) {
  uint32_t* words = reinterpret_cast<uint32_t*>(shared());
  for (int i = threadIdx.x; i < 3 * kBox / 4; i += blockDim.x) words[i] = 0x3f803f80;
  if (p.c.right) simt::fence_proxy();
  __syncthreads();
  if (!p.c.right && p.c.argument[0]) simt::fence_proxy();
  float d[64];
  wgmma_fence();
  wgmma_bf16_shared<false, false>(d, matrix_descriptor(shared_address(shared()), kBox),
                                  matrix_descriptor(shared_address(shared() + kBox), kBox), false);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 64; ++i) p.c.y[threadIdx.x * 64 + i] = d[i];
}

// The argument selects what the fault omits: the initialisation (1), the barrier behind it (2) or
// one arrival (3).
__global__ void barrier_uses(const __grid_constant__ Params p) {
  Barrier* barrier = reinterpret_cast<Barrier*>(shared());
  const int t = threadIdx.x, fault = p.c.right ? 0 : p.c.argument[0];
  if (t == 0 && fault != 1) barrier_init(barrier, 32);
  if (fault != 2) __syncthreads();
  for (int i = 0; i < 5; ++i) {
    if (t / 32 == i % 2 && (fault != 3 || t != 32)) barrier_arrive(barrier);
    barrier_wait(barrier, i % 2);
    __syncthreads();
  }
  p.c.y[t] = t;
}

// Per round four wgmma of 256 columns, as in a main loop.
__global__ void many_products(const __grid_constant__ Params p) {
  uint32_t* words = reinterpret_cast<uint32_t*>(shared());
  for (unsigned i = threadIdx.x; i < 5 * kBox / 4; i += blockDim.x) words[i] = 0;
  simt::fence_proxy();
  __syncthreads();
  float d[128];
  for (int round = 0; round < p.c.argument[0]; ++round) {
    wgmma_fence();
    for (int k = 0; k < 4; ++k)
      wgmma_bf16_shared<false, true>(
          d, matrix_descriptor(shared_address(shared()) + k * 32, kBox),
          matrix_descriptor(shared_address(shared() + kBox) + k * 2048, kBox), round + k > 0);
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  p.c.y[threadIdx.x] = d[0];
}

cudaError_t map_of(TensorMap* map, const Matrix& m) {
  if (!m.data) return cudaSuccess;
  return make_tensor_map(map, m.data, m.bytes == 2 ? DType::kBFloat16 : DType::kFloat32, m.rows,
                         m.cols, m.row_stride, m.box_rows, m.box_cols);
}

}  // namespace

void launch_sm90(const std::string& name, unsigned grid, int threads, int shared_bytes,
                 const CaseSm90& c) {
#define ENTRY(kernel) {#kernel, kernel}
#define PRODUCT(a, b)                                                   \
  {"product_bf16_" #a #b "_128", product<false, false, a, b, 128>},     \
      {"product_bf16_" #a #b "_256", product<false, false, a, b, 256>}, \
      {"product_f16_" #a #b "_128", product<true, false, a, b, 128>}, { \
    "product_f16_" #a #b "_256", product<true, false, a, b, 256>        \
  }
  static const std::map<std::string, void (*)(Params)> kernels = {
      ENTRY(copy_box),
      ENTRY(copy_alignment),
      ENTRY(ring),
      ENTRY(early_release),
      ENTRY(written_operand),
      ENTRY(barrier_uses),
      ENTRY(many_products),
      PRODUCT(0, 0),
      PRODUCT(0, 1),
      PRODUCT(1, 0),
      PRODUCT(1, 1),
      {"product_bf16_r0_128", product<false, true, false, false, 128>},
      {"product_bf16_r0_256", product<false, true, false, false, 256>},
      {"product_f16_r0_128", product<true, true, false, false, 128>},
      {"product_f16_r0_256", product<true, true, false, false, 256>}};
#undef ENTRY
#undef PRODUCT
  Params p{c, {}, {}};
  cudaError_t error = map_of(&p.a, c.a);
  if (error == cudaSuccess) error = map_of(&p.b, c.b);
  if (error == cudaSuccess)
    error = simt::launch(kernels.at(name), {grid, 1, 1}, threads, shared_bytes, nullptr, p);
  if (error != cudaSuccess) throw std::invalid_argument(cudaGetErrorString(error));
}

}  // namespace faults
