// Tile shapes and the layout of operands in shared memory.
// A tile of `rows` x `cols` products is shared out over warps; a step of the main loop brings 64
// bytes of each row of the features, whatever their dtype.
#pragma once

#include "cuda/math.cuh"
#include "cuda/sm80/plan.h"

namespace tvmf::sm80 {

template <Math kMath>
constexpr int kTileD = kStepBytes / sizeof(typename MathTraits<kMath>::X);

// 16 x 8 fragments of the products, as mma.m16n8 has them: a lane holds rows lane / 4 and + 8,
// columns 2 (lane % 4) and + 1. The paths without tensor cores use the same.
template <int kRows_, int kCols_, int kWarpsRow_, int kWarpsCol_>
struct Tile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kWarpsRow = kWarpsRow_, kWarpsCol = kWarpsCol_;
  static constexpr int kThreads = kWarp * kWarpsRow * kWarpsCol;
  static constexpr int kWarpRows = kRows / kWarpsRow, kWarpCols = kCols / kWarpsCol;
  static constexpr int kFragsRow = kWarpRows / 16, kFragsCol = kWarpCols / 8;
  static_assert(kWarpRows % 16 == 0 && kWarpCols % 16 == 0, "warps hold pairs of fragments");
};

// 128 x 128: 64 x 64 a warp, whose 8 loads of fragments serve 32 mma, and 128 accumulators a
// thread; two blocks a multiprocessor have up to 255 registers a thread. 64 x 64 for problems with
// fewer large tiles than multiprocessors.
using LargeTile = Tile<kLargeTile, kLargeTile, 2, 2>;
using SmallTile = Tile<kSmallTile, kSmallTile, 2, 2>;
// class_gradient: 128 rows x kClasses of cosines, then kClasses x 128 features of gradient.
template <Math kMath, int kClasses>
using GradientTile = Tile<kGradientRows, kClasses, 2, int(row_parts(kMath))>;
template <Math kMath, int kClasses>
using WeightTile = Tile<kClasses, kFeatureTile, 2, int(row_parts(kMath))>;

// Calls f with the shape of a tile of this size. Products without tensor cores have small tiles
// only.
template <Math kMath, class F>
cudaError_t with_tile(int64_t tile, const F& f) {
  if constexpr (kTensorCores<kMath>)
    if (tile == kLargeTile) return f(LargeTile{});
  return f(SmallTile{});
}

// Whether the block rounds the right operand to the features' dtype in shared memory before it is
// multiplied. It does so a step ahead, into one of two tiles.
template <Math kMath, class W>
constexpr bool kRounded = kTensorCores<kMath> && sizeof(W) > sizeof(typename MathTraits<kMath>::X);

// Stages of the pipeline: two beside rounded tiles, so that two blocks fit beside each other.
template <Math kMath, class W>
constexpr int kStages = kRounded<kMath, W> ? 2 : 4;

// An operand's tile in shared memory: `kLines` lines as they lie in global memory, 16-byte chunks
// swizzled so that no access below meets a bank twice. `kTransposed`: a line runs along rows (or
// columns) of the product instead of along what is summed over.
template <class T_, int kRows, Math kMath, bool kTransposed_>
struct OperandTile {
  using T = T_;
  static constexpr bool kTransposed = kTransposed_;
  static constexpr int kDepth = kTileD<kMath>;
  static constexpr int kLines = kTransposed ? kDepth : kRows;
  static constexpr int kLineElements = kTransposed ? kRows : kDepth;
  static constexpr int kLineBytes = kLineElements * int(sizeof(T));
  static constexpr int kLineChunks = kLineBytes / 16;
  static constexpr int kBytes = kLines * kLineBytes;
  static_assert(kLineBytes == 64 || kLineBytes % 128 == 0, "two lines or whole parts of 128 bytes");

  // ldmatrix reads one chunk of 8 successive lines: any 8 different phases will do. float32 is read
  // as words: in pairs from 4 successive lines, or as 8 words of lines q or 2 q.
  static constexpr bool kRotated =
      sizeof(T) == 4 && kTransposed == (sizeof(typename MathTraits<kMath>::X) == 4);

  static __device__ __forceinline__ int chunk_offset(int line, int chunk) {
    if constexpr (kLineBytes == 64) {
      const int phase = (line >> 1) & 3;
      return (line >> 1) * 128 + (((line & 1) * 4 + (chunk ^ phase)) << 4);
    } else {
      const int phase = kRotated ? ((line & 3) << 1) | ((line >> 2) & 1) : line & 7;
      return line * kLineBytes + ((chunk ^ phase) << 4);
    }
  }
  // The same of the line that lies `more` below, a constant: eight lines further on the phases are
  // those of the first eight, so that the compiler can add it to the address of an instruction.
  static __device__ __forceinline__ int chunk_offset(int line, int chunk, int more) {
    return more % 8 == 0 ? chunk_offset(line, chunk) + more * kLineBytes
                         : chunk_offset(line + more, chunk);
  }
  static __device__ __forceinline__ int offset(int line, int element) {
    const int byte = element * int(sizeof(T));
    return chunk_offset(line, byte >> 4) + (byte & 15);
  }
};

}  // namespace tvmf::sm80
