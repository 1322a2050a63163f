// Products on Hopper: a producer warp's bulk tensor copies fill a ring of stages ahead of the wgmma
// of two consumer warpgroups. The code does not depend on the loss.
#pragma once

#include "cuda/math.cuh"
#include "cuda/sm90/plan.h"
#include "cuda/sm90/ptx.cuh"

namespace tvmf::sm90 {

constexpr int kWarpgroup = 128, kConsumers = 2, kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
// Registers a thread. The block takes 2 x 128 x 240 + 128 x 24 of a multiprocessor's 65536; the
// accumulators of 64 x 256 products take 128 of a consumer's 240.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

constexpr int kLine = 128;  // bytes of a line of a stage, within which the swizzle permutes
// An atom of a transposed operand: 64 lines of 64 elements.
constexpr int kAtomBytes = kDepth * kLine;

// The state of a pipeline: its stage, and the parity of the number of times that it has come round.
template <int kStages>
struct PipelineState {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// The barriers of a ring of stages. Each of the two operands of a stage becomes empty on its own,
// as soon as all consumer warps have read it.
template <int kStages>
struct alignas(16) Ring {
  Barrier full[kStages], empty_a[kStages], empty_b[kStages];

  // All threads of the block call it.
  __device__ __forceinline__ void init() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(&full[i], 1);
        barrier_init(&empty_a[i], kConsumerWarps);
        barrier_init(&empty_b[i], kConsumerWarps);
      }
      barrier_init_fence();
    }
    __syncthreads();
  }
};

// The warp has read what the barrier guards.
__device__ __forceinline__ void release(Barrier* empty) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) barrier_arrive(empty);
}

// The lines of a product that a lane has: two of its warp's 16, of its warpgroup's 64.
struct WgmmaLane {
  int lane, group, quad;  // group: lane / 4, quad: lane % 4
  int warp, warpgroup;
  int line;  // the first of the lane's two lines of 64; the second is 8 further

  static __device__ __forceinline__ WgmmaLane of() {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    return {lane, lane / 4, lane % 4, warp, warp / 4, warp % 4 * 16 + lane / 4};
  }
};

// The low or the high number of a pair.
template <Math kMath>
__device__ __forceinline__ float half_of(uint32_t pair, int high) {
  if constexpr (kMath == Math::kBf16)
    return bits_as<float>(high ? pair & 0xffff0000 : pair << 16);
  else
    return to_float(f16{uint16_t(high ? pair >> 16 : pair)});
}

// The product that makes cosines: weights [classes, D], times arranged features [rows, D] of 16
// bits. float32 weights are rounded in registers; those of the features' dtype (kNarrow) are
// multiplied where they lie in shared memory. The warpgroups split the classes, or the rows where a
// tile has only 64 classes.
template <int kGroupRows_, bool kSplitRows_, bool kNarrow_>
struct CosineShape {
  static constexpr bool kNarrow = kNarrow_;
  static constexpr int kGroupRows = kGroupRows_;  // rows of a warpgroup
  static constexpr bool kSplitRows = kSplitRows_;
  static constexpr int kClasses = kSplitRows ? kSmallClasses : kLargeClasses;
  static constexpr int kRows = kSplitRows ? 2 * kGroupRows : kGroupRows;
  static_assert(kRows == kCosineRows, "the plan counts on it");
  // Bytes of a line's 128 for all classes. A stage has 64 columns of weights: two such boxes in
  // float32, and otherwise one.
  static constexpr int kBox = kClasses * kLine, kBoxes = kNarrow ? 1 : 2;
  static constexpr int kWeightBytes = kBoxes * kBox, kStageBytes = kWeightBytes + kRows * kLine;
  static constexpr int kStages = kStageBytes > 48 * 1024 ? 3 : 4;
  static constexpr int kStagesBytes = kStages * kStageBytes;
  static constexpr int kAccumulators = kGroupRows / 2;
  using Ring = sm90::Ring<kStages>;
  using State = PipelineState<kStages>;

  // Starts the copies of a step, as soon as its stage is empty.
  static __device__ __forceinline__ void copy(unsigned char* smem, Ring& ring, State& state,
                                              const TensorMap& weight, const TensorMap& x,
                                              int first_class, int first_row, int step) {
    unsigned char* stage = smem + state.stage * kStageBytes;
    Barrier* full = &ring.full[state.stage];
    barrier_wait(&ring.empty_a[state.stage], state.parity ^ 1);
    barrier_expect(full, kStageBytes);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box)
      tensor_copy(stage + box * kBox, weight, step * kDepth + box * 32, first_class, full);
    barrier_wait(&ring.empty_b[state.stage], state.parity ^ 1);
    tensor_copy(stage + kWeightBytes, x, step * kDepth, first_row, full);
    state.next();
  }

  // Multiplies all steps of a tile. `scale` is that of the lane's two unit rows of the weight,
  // where float32 is rounded to float16. `squares` gets the lane's share of the squares of its two
  // lines, unless they are multiplied where they lie. Where use.wanted, use(step, half, pairs) gets
  // the 16-bit weights of half a step: the pairs r, 2 + r, 4 + r and 6 + r are 8 successive columns
  // of line r.
  template <Math kMath, class Use>
  static __device__ __forceinline__ void multiply(const unsigned char* smem, Ring& ring,
                                                  State& state, const WgmmaLane& lane, int steps,
                                                  float (&acc)[kAccumulators],
                                                  [[maybe_unused]] const float (&scale)[2],
                                                  float (&squares)[2], const Use& use) {
    if constexpr (kNarrow)
      multiply_shared<kMath>(smem, ring, state, lane, steps, acc, use);
    else
      multiply_rounded<kMath>(smem, ring, state, lane, steps, acc, scale, squares, use);
  }

 private:
  // Both operands lie in shared memory, and both are free a step later.
  template <Math kMath, class Use>
  static __device__ __forceinline__ void multiply_shared(const unsigned char* smem, Ring& ring,
                                                         State& state, const WgmmaLane& lane,
                                                         int steps, float (&acc)[kAccumulators],
                                                         const Use& use) {
    const int first_line = kSplitRows ? 0 : lane.warpgroup * 64;
    const int x_line = kSplitRows ? lane.warpgroup * kGroupRows : 0;
    const auto released = [&](int stage) {
      release(&ring.empty_a[stage]);
      release(&ring.empty_b[stage]);
    };
    int last = -1;
    for (int step = 0; step < steps; ++step) {
      barrier_wait(&ring.full[state.stage], state.parity);
      const unsigned char* w_smem = smem + state.stage * kStageBytes + first_line * kLine;
      const uint32_t x_smem =
          shared_address(smem + state.stage * kStageBytes + kWeightBytes + x_line * kLine);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        const uint64_t a = matrix_descriptor(shared_address(w_smem) + k * 32, kAtomBytes);
        const uint64_t b = matrix_descriptor(x_smem + k * 32, kAtomBytes);
        const bool add = step + k > 0;
        if constexpr (kMath == Math::kBf16)
          wgmma_bf16_shared<false, false>(acc, a, b, add);
        else
          wgmma_f16_shared<false, false>(acc, a, b, add);
      }
      wgmma_commit();
      if (use.wanted) {
        struct alignas(16) Four {
          uint32_t v[4];
        };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Neighbouring groups of lanes take the halves in turn, and so read different banks.
          const int mine = half ^ (lane.group & 1);
          uint32_t pairs[8];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const Four w = load_as<Four>(w_smem + (lane.line + r * 8) * kLine +
                                         ((mine * 4 + lane.quad) ^ lane.group) * 16);
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[2 * i + r] = w.v[i];
          }
          use(step, mine, pairs);
        }
      }
      wgmma_wait<1>();
      if (last >= 0) released(last);
      last = state.stage;
      state.next();
    }
    wgmma_wait<0>();
    hold(acc);
    released(last);
  }

  template <Math kMath, class Use>
  static __device__ __forceinline__ void multiply_rounded(const unsigned char* smem, Ring& ring,
                                                          State& state, const WgmmaLane& lane,
                                                          int steps, float (&acc)[kAccumulators],
                                                          const float (&scale)[2],
                                                          float (&squares)[2], const Use& use) {
    const int weight_line = (kSplitRows ? 0 : lane.warpgroup * 64) + lane.line;
    const int x_line = kSplitRows ? lane.warpgroup * kGroupRows : 0;
    struct alignas(16) Four {
      float v[4];
    };
    uint32_t a[2][8];
    int last = -1;
    for (int step = 0; step < steps; ++step) {
      barrier_wait(&ring.full[state.stage], state.parity);
      const unsigned char* w_smem = smem + state.stage * kStageBytes + weight_line * kLine;
      const unsigned char* x_smem =
          smem + state.stage * kStageBytes + kWeightBytes + x_line * kLine;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            Four w = load_as<Four>(w_smem + half * kBox + r * 8 * kLine +
                                   ((lane.quad * 2 + k) ^ lane.group) * 16);
            if constexpr (kMath == Math::kF16) {
#pragma unroll
              for (float& each : w.v) each *= scale[r];
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const uint32_t pair = pack<kMath>(w.v[2 * i], w.v[2 * i + 1]);
              const float low = half_of<kMath>(pair, 0), high = half_of<kMath>(pair, 1);
              squares[r] = fma(high, high, fma(low, low, squares[r]));
              a[half][k * 4 + 2 * i + r] = pair;
            }
          }
        if (use.wanted) use(step, half, a[half]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint64_t b =
              matrix_descriptor(shared_address(x_smem) + (half * 2 + k) * 32, kAtomBytes);
          const bool add = step > 0 || half + k > 0;
          if constexpr (kMath == Math::kBf16)
            wgmma_bf16_registers(acc, &a[half][k * 4], b, add);
          else
            wgmma_f16_registers(acc, &a[half][k * 4], b, add);
        }
        wgmma_commit();
        if (half == 1) release(&ring.empty_a[state.stage]);
        // Now the registers of the other half may be written again, and so may the features of the
        // last step.
        wgmma_wait<1>();
        if (half == 0 && last >= 0) release(&ring.empty_b[last]);
      }
      last = state.stage;
      state.next();
    }
    wgmma_wait<0>();
    hold(acc);
    release(&ring.empty_b[last]);
  }
};

// Calls f with the kind of 16-bit product and the shape of the plan's cosine tiles.
template <class F>
cudaError_t with_cosine_shape(const Plan& plan, const F& f) {
  const auto with_rows = [&](auto math, auto narrow) {
    constexpr bool kNarrow = decltype(narrow)::value;
    return plan.small_tiles ? f(math, CosineShape<kCosineRows / 2, true, kNarrow>{})
                            : f(math, CosineShape<kCosineRows, false, kNarrow>{});
  };
  const auto with_shape = [&](auto math) {
    return plan.narrow_weight ? with_rows(math, std::true_type{})
                              : with_rows(math, std::false_type{});
  };
  return plan.math == Math::kBf16 ? with_shape(MathConstant<Math::kBf16>{})
                                  : with_shape(MathConstant<Math::kF16>{});
}

// A product of two 16-bit operands, of which a block makes 128 x 256 elements. The dimension that
// is summed over counts the lines of B; it counts the lines of A where A is transposed, and
// otherwise runs along them.
template <bool kTransposedA_>
struct ProductShape {
  static constexpr bool kTransposedA = kTransposedA_;
  static constexpr int kRows = kProductRows, kCols = kProductCols;
  static constexpr int kBytesA = kRows * kLine, kStageBytes = kBytesA + kCols * kLine;
  static constexpr int kStages = 4, kStagesBytes = kStages * kStageBytes;
  static constexpr int kAccumulators = 128;
  using Ring = sm90::Ring<kStages>;
  using State = PipelineState<kStages>;

  static __device__ __forceinline__ void copy(unsigned char* smem, Ring& ring, State& state,
                                              const TensorMap& a, const TensorMap& b, int first_row,
                                              int first_col, int depth) {
    unsigned char* stage = smem + state.stage * kStageBytes;
    Barrier* full = &ring.full[state.stage];
    barrier_wait(&ring.empty_a[state.stage], state.parity ^ 1);
    barrier_expect(full, kStageBytes);
    if constexpr (kTransposedA) {
#pragma unroll
      for (int i = 0; i < kRows / kAtom; ++i)
        tensor_copy(stage + i * kAtomBytes, a, first_row + i * kAtom, depth, full);
    } else {
      tensor_copy(stage, a, depth, first_row, full);
    }
    barrier_wait(&ring.empty_b[state.stage], state.parity ^ 1);
#pragma unroll
    for (int i = 0; i < kCols / kAtom; ++i)
      tensor_copy(stage + kBytesA + i * kAtomBytes, b, first_col + i * kAtom, depth, full);
    state.next();
  }

  template <Math kMath>
  static __device__ __forceinline__ void multiply(const unsigned char* smem, Ring& ring,
                                                  State& state, const WgmmaLane& lane, int steps,
                                                  float (&acc)[kAccumulators]) {
    constexpr int kStepA = kTransposedA ? 16 * kLine : 32;
    int last = -1;
    for (int step = 0; step < steps; ++step) {
      barrier_wait(&ring.full[state.stage], state.parity);
      const uint32_t stage = shared_address(smem + state.stage * kStageBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        const uint64_t a =
            matrix_descriptor(stage + lane.warpgroup * 64 * kLine + k * kStepA, kAtomBytes);
        const uint64_t b = matrix_descriptor(stage + kBytesA + k * 16 * kLine, kAtomBytes);
        const bool add = step + k > 0;
        if constexpr (kMath == Math::kBf16)
          wgmma_bf16_shared<kTransposedA, true>(acc, a, b, add);
        else
          wgmma_f16_shared<kTransposedA, true>(acc, a, b, add);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (last >= 0) released(ring, last);
      last = state.stage;
      state.next();
    }
    wgmma_wait<0>();
    hold(acc);
    released(ring, last);
  }
  static __device__ __forceinline__ void released(Ring& ring, int stage) {
    release(&ring.empty_a[stage]);
    release(&ring.empty_b[stage]);
  }
};

}  // namespace tvmf::sm90
