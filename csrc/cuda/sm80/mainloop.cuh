// acc[i][j] = sum_k A[i][k] B[j][k]: a tile of products from two operands in global memory, through
// a pipeline of cp.async stages in shared memory. The code does not depend on the loss.
#pragma once

#include "cuda/class_terms.cuh"
#include "cuda/sm80/pipeline.cuh"
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

// The same number, of which nvcc knows nothing. It cannot work out ahead what follows from it, such
// as the addresses of all rows of a tile, which would take registers in the main loop.
__device__ __forceinline__ int computed_here(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// The sums of kCount values over the eight lanes that hold a column of a fragment: the lane of row
// `group` of a fragment gets that of v[group % kCount]. Each exchange halves the values that a lane
// has left, where sums one by one would take three each.
template <int kCount, class T>
__device__ __forceinline__ T group_sums(T (&v)[kCount], int group) {
  static_assert(kCount == 8 || kCount == 4);
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = group & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T keep = upper ? v[i + half] : v[i], send = upper ? v[i] : v[i + half];
      v[i] = keep + __shfl_xor_sync(0xffffffff, send, 4 * half);
    }
  }
  return kCount == 8 ? v[0] : v[0] + __shfl_xor_sync(0xffffffff, v[0], 16);
}

// Starts the copies of one operand's tiles into stages, one step of the main loop after another. A
// thread copies the same 16 bytes of several lines, so that one pointer leads to all of them.
template <class Layout, int kThreads>
class TileLoader {
 public:
  using T = typename Layout::T;

  explicit __device__ __forceinline__ TileLoader(const Operand<T>& operand)
      : operand_(operand), whole_(operand.vectors && operand.elements % kPerChunk == 0) {}

  // Copies the tile at this line and element. Where it is not `first`, it must be the one that
  // follows the last along what is summed over.
  __device__ __forceinline__ void load(int64_t line, int64_t element, bool first,
                                       unsigned char* stage_smem) {
    if (!whole_) return gather(line, element, stage_smem);
    const int own_line = threadIdx.x / Layout::kLineChunks;
    const int chunk = threadIdx.x % Layout::kLineChunks;
    if (first) {
      const int64_t l = line + own_line, e = element + chunk * kPerChunk;
      from_ = operand_.data + l * operand_.line_stride + e;
      const int64_t most = Layout::kTransposed ? int64_t(INT32_MAX) : Layout::kLines;
      lines_left_ = int(operand_.lines - l < most ? operand_.lines - l : most);
      elements_left_ = operand_.elements - e;
    }
    const T* from = from_;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async_or_zero(stage_smem + Layout::chunk_offset(own_line, chunk, i * kLineStep), from,
                       elements_left_ > 0 && lines_left_ > i * kLineStep);
      from += kLineStep * operand_.line_stride;
    }
    if constexpr (Layout::kTransposed) {
      from_ += Layout::kDepth * operand_.line_stride;
      lines_left_ -= Layout::kDepth;
    } else {
      from_ += Layout::kDepth;
      elements_left_ -= Layout::kDepth;
    }
  }

 private:
  static constexpr int kPerChunk = 16 / sizeof(T);
  static constexpr int kLineStep = kThreads / Layout::kLineChunks;
  static constexpr int kCopies = Layout::kLines / kLineStep;
  static_assert(kLineStep * Layout::kLineChunks == kThreads);
  static_assert(kCopies * kLineStep == Layout::kLines, "every thread copies as much");

  // The same for an operand of any strides, alignment and extent.
  __device__ __forceinline__ void gather(int64_t first_line, int64_t first_element,
                                         unsigned char* stage_smem) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < Layout::kLines * Layout::kLineChunks; i += kThreads) {
      const int line = i / Layout::kLineChunks, chunk = i % Layout::kLineChunks;
      const int64_t l = first_line + line, e = first_element + chunk * kPerChunk;
      unsigned char* to = stage_smem + Layout::chunk_offset(line, chunk);
      const int64_t left = l < operand_.lines ? operand_.elements - e : 0;
      const int count = left <= 0 ? 0 : left < kPerChunk ? int(left) : kPerChunk;
      const T* from =
          operand_.data + (count ? l * operand_.line_stride + e * operand_.element_stride : 0);
      if (operand_.vectors) {
        cp_async(to, from, count * int(sizeof(T)));
      } else {
        struct alignas(16) Part {
          T element[kPerChunk];
        } part;
#pragma unroll
        for (int k = 0; k < kPerChunk; ++k)
          part.element[k] = k < count ? from[k * operand_.element_stride] : T{};
        store_as(to, part);
      }
    }
  }

  const Operand<T> operand_;
  const bool whole_;         // whether every 16 bytes lie inside or outside the operand
  const T* from_ = nullptr;  // the thread's bytes of its first line in the next tile
  int lines_left_ = 0;       // of the operand, from there
  int64_t elements_left_ = 0;
};

// Lines of an operand's tile, each of which two threads have together: a thread has half of kOwn
// lines, which are kStep apart.
template <class Layout, int kThreads>
struct HalfLines {
  static_assert(!Layout::kTransposed);
  static constexpr int kStep = kThreads / 2, kOwn = Layout::kLines / kStep;
  static_assert(kOwn * kStep == Layout::kLines);
  static __device__ __forceinline__ int first() { return threadIdx.x / 2; }
  static __device__ __forceinline__ int side() { return threadIdx.x % 2; }
};

// Adds the squares of the thread's halves of lines.
template <Math kMath, class Layout, int kThreads, class Acc>
__device__ __forceinline__ void add_squares(const unsigned char* smem,
                                            Acc (&sums)[HalfLines<Layout, kThreads>::kOwn]) {
  using T = typename Layout::T;
  using Lines = HalfLines<Layout, kThreads>;
  constexpr int kHalf = Layout::kLineChunks / 2;
  struct alignas(16) Part {
    T element[16 / sizeof(T)];
  };
  const int line = Lines::first(), side = Lines::side();
#pragma unroll
  for (int own = 0; own < Lines::kOwn; ++own)
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int chunk = Layout::kRotated ? 2 * i + side : side * kHalf + i;
      const Part part = load_as<Part>(smem + Layout::chunk_offset(line, chunk, own * Lines::kStep));
#pragma unroll
      for (int k = 0; k < int(16 / sizeof(T)); ++k) {
        const Acc number = to_number<Acc>(part.element[k]);
        const Acc value = sizeof(T) == 2 ? number : as_operand<kMath>(number);
        sums[own] = fma(value, value, sums[own]);
      }
    }
}

struct alignas(16) FourFloats {
  float value[4];
};
struct alignas(8) FourRounded {
  uint32_t pair[2];
};
template <Math kMath>
__device__ __forceinline__ FourRounded round_four(const FourFloats& from) {
  return {{pack<kMath>(from.value[0], from.value[1]), pack<kMath>(from.value[2], from.value[3])}};
}
// Adds the squares of four numbers in bfloat16.
__device__ __forceinline__ void add_squares_of(const FourRounded& four, float& sum) {
#pragma unroll
  for (const uint32_t pair : four.pair) {
    const float low = bits_as<float>(pair << 16), high = bits_as<float>(pair & 0xffff0000);
    sum = fma(low, low, sum);
    sum = fma(high, high, sum);
  }
}

// Rounds a tile of float32 whose lines run along what is summed over. `visit(own, four)` returns
// what is stored of each four numbers of the thread's line `own`.
template <class From, class To, int kThreads, class Visit>
__device__ __forceinline__ void round_lines(const unsigned char* from_smem, unsigned char* to_smem,
                                            const Visit& visit) {
  using Lines = HalfLines<From, kThreads>;
  static_assert(From::kRotated && To::kLineBytes == 64, "without bank conflicts");
  const int line = Lines::first(), side = Lines::side();
#pragma unroll
  for (int own = 0; own < Lines::kOwn; ++own)
#pragma unroll
    for (int chunk = 0; chunk < To::kLineChunks; ++chunk) {
      const auto four = load_as<FourFloats>(
          from_smem + From::chunk_offset(line, 2 * chunk + side, own * Lines::kStep));
      store_as(to_smem + To::chunk_offset(line, chunk, own * Lines::kStep) + side * 8,
               visit(own, four));
    }
}

// Rounds a tile of float32 whose lines run along columns.
template <Math kMath, class From, class To, int kThreads>
__device__ __forceinline__ void round_columns(const unsigned char* from_smem,
                                              unsigned char* to_smem) {
  static_assert(From::kTransposed && kThreads % From::kLineChunks == 0);
  constexpr int kStep = kThreads / From::kLineChunks;
  const int line = threadIdx.x / From::kLineChunks, chunk = threadIdx.x % From::kLineChunks;
#pragma unroll
  for (int more = 0; more < From::kLines; more += kStep) {
    const auto four = load_as<FourFloats>(from_smem + From::chunk_offset(line, chunk, more));
    store_as(to_smem + To::chunk_offset(line, chunk / 2, more) + chunk % 2 * 8,
             round_four<kMath>(four));
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

// Fragment i, of 16 rows from the warp's first row, and 32 bytes of depth of the left operand.
template <Math kMath, class Layout>
__device__ __forceinline__ void load_fragment_a(uint32_t (&a)[4], const unsigned char* smem,
                                                int first_row, int i, int step, const Lane& lane) {
  const int matrix = lane.lane / 8, row = lane.lane % 8;
  if constexpr (!Layout::kTransposed) {
    load_matrix_x4(a, smem + Layout::chunk_offset(first_row + row + matrix % 2 * 8,
                                                  step * 2 + matrix / 2, i * 16));
  } else if constexpr (sizeof(typename Layout::T) == 2) {
    load_matrix_x4_transposed(
        a, smem + Layout::chunk_offset(row + matrix / 2 * 8, (first_row / 8 + matrix % 2) ^ i * 2,
                                       step * 16));
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      a[k] = load_as<uint32_t>(smem + Layout::offset(step * 8 + lane.quad + k / 2 * 4,
                                                     first_row + i * 16 + lane.group + k % 2 * 8));
  }
  if constexpr (kMath == Math::kTf32)
#pragma unroll
    for (int k = 0; k < 4; ++k) a[k] = to_tf32(a[k]);
}

// Two fragments of 8 columns each, 16 j columns from the warp's first, of the right operand.
template <Math kMath, class Layout>
__device__ __forceinline__ void load_fragments_b(uint32_t (&b)[2][2], const unsigned char* smem,
                                                 int first_col, int j, int step, const Lane& lane) {
  const int matrix = lane.lane / 8, row = lane.lane % 8;
  uint32_t frag[4];
  if constexpr (!Layout::kTransposed) {
    load_matrix_x4(frag, smem + Layout::chunk_offset(first_col + row + matrix / 2 * 8,
                                                     step * 2 + matrix % 2, j * 16));
  } else if constexpr (sizeof(typename Layout::T) == 2) {
    load_matrix_x4_transposed(
        frag, smem + Layout::chunk_offset(row + matrix % 2 * 8,
                                          (first_col / 8 + matrix / 2) ^ j * 2, step * 16));
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      frag[k] =
          load_as<uint32_t>(smem + Layout::offset(step * 8 + lane.quad + k % 2 * 4,
                                                  first_col + j * 16 + lane.group + k / 2 * 8));
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) b[k / 2][k % 2] = kMath == Math::kTf32 ? to_tf32(frag[k]) : frag[k];
}

// One stage's products on tensor cores: two fragments deep.
template <Math kMath, class Shape, class LayoutA, class LayoutB, class Acc>
__device__ __forceinline__ void multiply_stage_mma(const unsigned char* a_smem,
                                                   const unsigned char* b_smem, const Lane& lane,
                                                   Accumulator<Acc, Shape>& acc) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t a[Shape::kFragsRow][4], b[Shape::kFragsCol / 2][2][2];
#pragma unroll
    for (int i = 0; i < Shape::kFragsRow; ++i)
      load_fragment_a<kMath, LayoutA>(a[i], a_smem, lane.warp_row * Shape::kWarpRows, i, step,
                                      lane);
#pragma unroll
    for (int j = 0; j < Shape::kFragsCol / 2; ++j)
      load_fragments_b<kMath, LayoutB>(b[j], b_smem, lane.warp_col * Shape::kWarpCols, j, step,
                                       lane);
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
                                               Accumulator<Acc, Shape>& acc) {
  if constexpr (kTensorCores<kMath>)
    multiply_stage_mma<kMath, Shape, LayoutA, LayoutB, Acc>(a_smem, b_smem, lane, acc);
  else
    multiply_stage_fma<kMath, Shape, LayoutA, LayoutB, Acc>(a_smem, b_smem, lane, acc);
}

}  // namespace tvmf::sm80
