// The plan of the portable kernels: mma.sync and cp.async, compute capability 8.0 and newer, every
// mix of dtypes. Tile sizes are chosen here and used by the kernels (sm80/tile.cuh).
#pragma once

#include "cuda/rows/workspace.h"

namespace tvmf::sm80 {

constexpr int64_t kLargeTile = 128, kSmallTile = 64;  // cosines and dx: tiles of this size squared
constexpr int64_t kGradientRows = 128;                // rows of class_gradient's gradient tile
constexpr int64_t kFeatureTile = 128;                 // features of its weight gradient's tile
constexpr int64_t kStepBytes = 64;  // bytes of a row of features in one step of the main loop

constexpr bool on_tensor_cores(Math math) { return math != Math::kF32 && math != Math::kF64; }
// Whether class_gradient has instances with large tiles of classes. TF32's would need more
// registers than a thread has, and each takes the compiler half a minute.
constexpr bool has_large_classes(Math math) { return math == Math::kBf16; }
// Warps of class_gradient that share a row, each with a partial row sum. Without tensor cores a
// warp has half as many products, because its operands take more registers.
constexpr int64_t row_parts(Math math) { return on_tensor_cores(math) ? 2 : 4; }

// Bytes of shared memory of class_gradient with small tiles, without a resident gradient tile.
// `rounded`: whether it rounds float32 weights to 16 bits there.
constexpr int64_t gradient_shared_bytes(Math math, bool rounded) {
  if (math == Math::kF64) return 55872;
  if (math == Math::kF32) return 52544;
  return rounded ? 44320 : 40224;
}

constexpr int64_t kLargeGradientBytes = 72224;  // the same with large tiles of classes

static_assert(kLargeTile <= kLargestTile && kGradientRows <= kLargestTile);

struct Plan {
  Math math;
  // Few launches, for a small N x C: one chunk of classes, whose gradient tile and weight gradient
  // are made in one launch. Otherwise the backward pass takes three launches a chunk.
  bool latency;
  int64_t kept;  // row stride of the products that the forward pass keeps, or 0

  // row_statistics: a block makes tiles of tile x tile cosines; grid [row_tiles, class_splits].
  int64_t tile, row_tiles, class_splits, tiles_per_split;

  // class_gradient: a block has class_tile classes, which are 64 on the latency path; one launch
  // has `chunk` classes, a multiple of class_tile.
  int64_t class_tile, chunk, chunks;
  bool resident;           // whether the gradient tile of all rows stays in shared memory
  int64_t row_groups;      // blocks that share a class tile's rows; 1 on the latency path
  int64_t feature_splits;  // blocks that share a class tile's weight gradient

  // input_gradient: blocks of input_tile x input_tile; grid [row tiles, feature tiles, splits].
  int64_t input_tile, input_splits;

  bool adds_gradients() const { return false; }
  rows::PartialCounts partial_counts() const {
    const int64_t tiles = chunk / class_tile;
    return {tiles * row_parts(math), input_splits, tiles * row_groups};
  }
};

struct ForwardWorkspace {
  ForwardWorkspace(const CudaProblem& problem, const Plan& plan);
  rows::ForwardWorkspace rows;
  int64_t size;
};

struct BackwardWorkspace {
  BackwardWorkspace(const CudaProblem& problem, const Plan& plan);
  rows::BackwardWorkspace rows;
  int64_t gradient;             // GradientMatrix: N x chunk elements of x's dtype
  int64_t column_sums;          // [slots, 3, chunk] accumulators
  int64_t unit_x, unit_weight;  // UnitRows of all rows and of a chunk's classes, in float16
  int64_t size;
};

// These kernels serve every problem.
constexpr bool serves(const CudaProblem&, const Gpu&) { return true; }
Plan make_plan(const CudaProblem& problem, const Gpu& gpu);
Memory memory_of(const CudaProblem& problem, const Plan& plan);
Cost cost_of(const CudaProblem& problem, const Plan& plan, const Gpu& gpu);
std::vector<PlanField> fields_of(const Plan& plan);

}  // namespace tvmf::sm80
