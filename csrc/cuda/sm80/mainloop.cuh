// acc[i][j] = sum_k A[i][k] B[j][k]: a tile of products from two operands in global memory, through
// a pipeline of cp.async stages in shared memory. The code does not depend on the loss.
#pragma once

#include "cuda/class_terms.cuh"
#include "cuda/sm80/tile.cuh"

namespace tvmf::sm80 {

struct Lane {
  int warp_row, warp_col;  // of the block's tile, in warps
  int group, quad;         // lane / 4: its row of a fragment; lane % 4: its pair of columns
  int lane;

  template <class Shape>
  static __device__ __forceinline__ Lane of() {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    return {warp / Shape::kWarpsCol, warp % Shape::kWarpsCol, lane / 4, lane % 4, lane};
  }
  // Row and column in the block's tile of accumulator `half`, `e` of fragment i, j.
  template <class Shape>
  __device__ __forceinline__ int row(int i, int half) const {
    return warp_row * Shape::kWarpRows + i * 16 + half * 8 + group;
  }
  template <class Shape>
  __device__ __forceinline__ int col(int j) const {
    return warp_col * Shape::kWarpCols + j * 8 + quad * 2;
  }
};

template <class Acc, class Shape>
using Accumulator = Acc[Shape::kFragsRow][Shape::kFragsCol][4];

template <class Acc, int kI, int kJ>
__device__ __forceinline__ void clear(Acc (&acc)[kI][kJ][4]) {
#pragma unroll
  for (int i = 0; i < kI; ++i)
#pragma unroll
    for (int j = 0; j < kJ; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;
}

// Starts the copy of one operand's tile into a stage.
template <class Layout, int kThreads, class T>
__device__ __forceinline__ void load_operand(const Operand<T>& operand, int64_t first_line,
                                             int64_t first_element, unsigned char* stage_smem) {
  constexpr int kPerChunk = 16 / sizeof(T);
  for (int i = threadIdx.x; i < Layout::kLines * Layout::kLineChunks; i += kThreads) {
    const int line = i / Layout::kLineChunks, chunk = i % Layout::kLineChunks;
    const int64_t l = first_line + line, e = first_element + chunk * kPerChunk;
    unsigned char* to = stage_smem + Layout::chunk_offset(line, chunk);
    const int64_t left = l < operand.lines ? operand.elements - e : 0;
    const int count = left <= 0 ? 0 : left < kPerChunk ? int(left) : kPerChunk;
    const T* from =
        operand.data + (count ? l * operand.line_stride + e * operand.element_stride : 0);
    if (operand.vectors) {
      cp_async(to, from, count * int(sizeof(T)));
    } else {
      struct alignas(16) Part {
        T element[kPerChunk];
      } part;
#pragma unroll
      for (int k = 0; k < kPerChunk; ++k)
        part.element[k] = k < count ? from[k * operand.element_stride] : T{};
      store_as(to, part);
    }
  }
}

// Adds to `sum` the squares of every other 16 bytes of a line: two threads have a line together.
template <Math kMath, class Layout, class Acc>
__device__ __forceinline__ void add_squares(const unsigned char* smem, Acc& sum) {
  using T = typename Layout::T;
  static_assert(!Layout::kTransposed);
  constexpr int kHalf = Layout::kLineChunks / 2;
  struct alignas(16) Part {
    T element[16 / sizeof(T)];
  };
  const int line = threadIdx.x / 2, side = threadIdx.x % 2;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const int chunk = Layout::kRotated ? 2 * i + side : side * kHalf + i;
    const Part part = load_as<Part>(smem + Layout::chunk_offset(line, chunk));
#pragma unroll
    for (int k = 0; k < int(16 / sizeof(T)); ++k) {
      const Acc number = to_number<Acc>(part.element[k]);
      const Acc value = sizeof(T) == 2 ? number : as_operand<kMath>(number);
      sum = fma(value, value, sum);
    }
  }
}

template <Math kMath>
__device__ __forceinline__ void multiply_fragments(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  if constexpr (kMath == Math::kBf16)
    mma_bf16(d, a, b);
  else if constexpr (kMath == Math::kF16)
    mma_f16(d, a, b);
  else
    mma_tf32(d, a, b);
}

// Fragment of 16 rows and 32 bytes of depth (of the features' dtype) of the left operand.
template <Math kMath, class Layout>
__device__ __forceinline__ void load_fragment_a(uint32_t (&a)[4], const unsigned char* smem,
                                                int first_row, int step, const Lane& lane) {
  const int matrix = lane.lane / 8, row = lane.lane % 8;
  if constexpr (!Layout::kTransposed) {
    load_matrix_x4(
        a, smem + Layout::chunk_offset(first_row + row + matrix % 2 * 8, step * 2 + matrix / 2));
  } else if constexpr (sizeof(typename Layout::T) == 2) {
    load_matrix_x4_transposed(
        a, smem + Layout::offset(step * 16 + row + matrix / 2 * 8, first_row + matrix % 2 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = load_as<uint32_t>(smem + Layout::offset(step * 8 + lane.quad + i / 2 * 4,
                                                     first_row + lane.group + i % 2 * 8));
  }
  if constexpr (kMath == Math::kTf32)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = to_tf32(a[i]);
}

// Two fragments of 8 columns each of the right operand, which is rounded to the features' dtype. In
// float16 it is made of unit rows, whose rnorm is given.
template <Math kMath, class Layout>
__device__ __forceinline__ void load_fragments_b(uint32_t (&b)[2][2], const unsigned char* smem,
                                                 int first_col, int step, const Lane& lane,
                                                 [[maybe_unused]] const float* rnorm) {
  const int matrix = lane.lane / 8, row = lane.lane % 8;
  uint32_t frag[4];
  if constexpr (sizeof(typename Layout::T) == 4 && kMath != Math::kTf32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int col = first_col + lane.group + i / 2 * 8, k = step * 16 + i % 2 * 8 + lane.quad * 2;
      if constexpr (!Layout::kTransposed) {
        struct Pair {
          float low, high;
        };
        Pair pair = load_as<Pair>(smem + Layout::offset(col, k));
        if constexpr (kMath == Math::kF16) {
          const float scale = unit_scale(rnorm[col]);
          pair.low *= scale, pair.high *= scale;
        }
        frag[i] = pack<kMath>(pair.low, pair.high);
      } else {
        static_assert(kMath != Math::kF16, "the copies of unit rows are operands there");
        frag[i] = pack<kMath>(load_as<float>(smem + Layout::offset(k, col)),
                              load_as<float>(smem + Layout::offset(k + 1, col)));
      }
    }
  } else if constexpr (!Layout::kTransposed) {
    load_matrix_x4(
        frag, smem + Layout::chunk_offset(first_col + row + matrix / 2 * 8, step * 2 + matrix % 2));
  } else if constexpr (sizeof(typename Layout::T) == 2) {
    load_matrix_x4_transposed(
        frag, smem + Layout::offset(step * 16 + row + matrix % 2 * 8, first_col + matrix / 2 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      frag[i] = load_as<uint32_t>(smem + Layout::offset(step * 8 + lane.quad + i % 2 * 4,
                                                        first_col + lane.group + i / 2 * 8));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = kMath == Math::kTf32 ? to_tf32(frag[i]) : frag[i];
}

// One stage's products on tensor cores: two fragments deep.
template <Math kMath, class Shape, class LayoutA, class LayoutB, class Acc>
__device__ __forceinline__ void multiply_stage_mma(const unsigned char* a_smem,
                                                   const unsigned char* b_smem, const Lane& lane,
                                                   Accumulator<Acc, Shape>& acc,
                                                   const float* b_rnorm) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t a[Shape::kFragsRow][4], b[Shape::kFragsCol / 2][2][2];
#pragma unroll
    for (int i = 0; i < Shape::kFragsRow; ++i)
      load_fragment_a<kMath, LayoutA>(a[i], a_smem, lane.warp_row * Shape::kWarpRows + i * 16, step,
                                      lane);
#pragma unroll
    for (int j = 0; j < Shape::kFragsCol / 2; ++j)
      load_fragments_b<kMath, LayoutB>(b[j], b_smem, lane.warp_col * Shape::kWarpCols + j * 16,
                                       step, lane, b_rnorm);
#pragma unroll
    for (int i = 0; i < Shape::kFragsRow; ++i)
#pragma unroll
      for (int j = 0; j < Shape::kFragsCol; ++j)
        multiply_fragments<kMath>(acc[i][j], a[i], b[j / 2][j % 2]);
  }
}

// One stage's products by fused multiply-adds, 16 bytes of depth at a time.
template <Math kMath, class Shape, class LayoutA, class LayoutB, class Acc>
__device__ __forceinline__ void multiply_stage_fma(const unsigned char* a_smem,
                                                   const unsigned char* b_smem, const Lane& lane,
                                                   Accumulator<Acc, Shape>& acc) {
  constexpr int kDeep = 16 / sizeof(Acc), kR = 2 * Shape::kFragsRow, kC = 2 * Shape::kFragsCol;
  struct alignas(16) Deep {
    Acc k[kDeep];
  };
  for (int chunk = 0; chunk < 4; ++chunk) {
    Deep a[kR], b[kC];
#pragma unroll
    for (int i = 0; i < kR; ++i) {
      const int row = lane.row<Shape>(i / 2, i % 2);
      if constexpr (!LayoutA::kTransposed)
        a[i] = load_as<Deep>(a_smem + LayoutA::chunk_offset(row, chunk));
      else
#pragma unroll
        for (int k = 0; k < kDeep; ++k)
          a[i].k[k] = load_as<Acc>(a_smem + LayoutA::offset(chunk * kDeep + k, row));
    }
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      const int col = lane.col<Shape>(j / 2) + j % 2;
      if constexpr (!LayoutB::kTransposed)
        b[j] = load_as<Deep>(b_smem + LayoutB::chunk_offset(col, chunk));
      else
#pragma unroll
        for (int k = 0; k < kDeep; ++k)
          b[j].k[k] = load_as<Acc>(b_smem + LayoutB::offset(chunk * kDeep + k, col));
    }
#pragma unroll
    for (int i = 0; i < kR; ++i)
#pragma unroll
      for (int j = 0; j < kC; ++j)
#pragma unroll
        for (int k = 0; k < kDeep; ++k) {
          Acc& sum = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
          sum = fma(a[i].k[k], b[j].k[k], sum);
        }
  }
}

template <Math kMath, class Shape, class LayoutA, class LayoutB, class Acc>
__device__ __forceinline__ void multiply_stage(const unsigned char* a_smem,
                                               const unsigned char* b_smem, const Lane& lane,
                                               Accumulator<Acc, Shape>& acc,
                                               const float* b_rnorm = nullptr) {
  if constexpr (kTensorCores<kMath>)
    multiply_stage_mma<kMath, Shape, LayoutA, LayoutB, Acc>(a_smem, b_smem, lane, acc, b_rnorm);
  else
    multiply_stage_fma<kMath, Shape, LayoutA, LayoutB, Acc>(a_smem, b_smem, lane, acc);
}

// Runs `tiles` tiles of `steps` stages each without draining the pipeline between them: the next
// tile's loads are under way while `finish` works on the last one's products.
//   load(tile, step, stage)   starts the copies       start(tile)  first step's data have arrived
//   multiply(step, stage)     a stage's products      finish(tile) all products are there
template <int kStages, class Load, class Start, class Multiply, class Finish>
__device__ __forceinline__ void pipeline(int tiles, int steps, const Load& load, const Start& start,
                                         const Multiply& multiply, const Finish& finish) {
  // No stage may be written while a warp still reads what the last pipeline left there.
  __syncthreads();
  int next_tile = 0, next_step = 0, next_stage = 0;
  const auto prefetch = [&] {
    if (next_tile < tiles) {
      load(next_tile, next_step, next_stage);
      if (++next_step == steps) next_step = 0, ++next_tile;
      if (++next_stage == kStages) next_stage = 0;
    }
    cp_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) prefetch();
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    for (int step = 0; step < steps; ++step) {
      // The oldest stage has arrived, and the one before it has been read by all.
      cp_async_wait<kStages - 2>();
      __syncthreads();
      prefetch();
      if (step == 0) start(tile);
      multiply(step, stage);
      if (++stage == kStages) stage = 0;
    }
    finish(tile);
  }
  cp_async_wait<0>();
}

}  // namespace tvmf::sm80
