// How a problem is cut into pieces. Pure: the same numbers give the same plan on every machine and
// thread count, so that results are bitwise reproducible.
#pragma once

#include <cstdint>
#include <string>

#include "problem.h"

namespace tvmf {

// How two operands are multiplied: on tensor cores but for the last two.
enum class Math : int32_t { kF16, kBf16, kTf32, kF32, kF64 };

constexpr Math math_of(DType x, bool allow_tf32) {
  switch (x) {
    case DType::kFloat16: return Math::kF16;
    case DType::kBFloat16: return Math::kBf16;
    case DType::kFloat32: return allow_tf32 ? Math::kTf32 : Math::kF32;
    default: return Math::kF64;
  }
}

// What a plan needs to know of a GPU; the rates are what kernels reach, for the prediction only.
struct Gpu {
  const char* name;
  int64_t sms;
  int64_t shared_per_block, shared_per_sm;  // bytes
  int64_t l2;                               // bytes
  double hbm_rate, l2_rate;                 // bytes/s
  double flop_rate[5];                      // by Math
  double launch_seconds;                    // of a kernel with nothing to do
  bool wgmma = false;                       // Hopper's own instructions, and what they reach
  double wgmma_flop_rate = 0, wgmma_l2_rate = 0;
};

// "H200", "H100", "A100", ...; null if there is none of that name.
const Gpu* find_gpu(const std::string& name);
std::string gpu_names();

struct CudaProblem {
  int64_t N, C, D;
  DType x, weight;
  bool allow_tf32;
  int64_t kept;  // C or more where the forward pass keeps all products, else 0
  bool with_sum;
  bool bulk = false;  // weights' rows lie as bulk copies read them: contiguous, 16-byte aligned
};

// The same on Hopper (csrc/forward_sm90.cu, backward_sm90.cu), in place of what follows it below
// but for `chunk` and `input_splits`.
struct HopperPlan {
  bool used;
  bool few;               // tiles of 64 classes, or of 128
  int64_t rows, columns;  // of the arranged features
  int64_t row_blocks, class_tiles;
  int64_t walkers, gradient_walkers;     // blocks that share the tiles of their rows
  int64_t grad_stride, weight_stride;    // elements
  int64_t col_slots, dot_slots, totals;  // partial sums
  int64_t blocks;                        // that run at once
};

struct CudaPlan {
  CudaProblem problem;
  Math math;
  HopperPlan hopper;
  bool latency;  // few launches: one chunk, whose gradient tile and weight gradient are one launch

  // row_statistics: blocks of tile x tile cosines; grid [row_tiles, class_splits].
  int64_t tile, row_tiles, class_splits, tiles_per_split;
  int64_t finish_rows;  // of a block that merges the runs; if not N one more launch adds up

  // class_gradient: blocks of 64 classes; `chunk` classes a launch.
  int64_t chunk, chunks;
  bool resident;           // the block's gradient tile of all rows stays in shared memory
  int64_t row_groups;      // blocks that share a class tile's rows; 1 on the latency path
  int64_t feature_splits;  // blocks that share a class tile's weight gradient

  // input_gradient: blocks of input_tile x input_tile; grid [row tiles, feature tiles, splits].
  int64_t input_tile, input_splits;

  // What it costs, by count.
  int64_t forward_launches, backward_launches;
  int64_t forward_workspace, backward_workspace, saved;  // bytes
  double forward_flops, backward_flops;
  double forward_hbm, backward_hbm;  // bytes
  double forward_l2, backward_l2;    // bytes that tiles load
  double forward_seconds, backward_seconds;
};

// Where things lie in the workspaces, in bytes; the shapes stand where forward.cu and backward.cu
// take them out.
struct ForwardWorkspace {
  explicit ForwardWorkspace(const CudaPlan& plan);
  int64_t label, target_score, target, max, sum_exp, sum, rank, totals, arranged, size;
};

struct BackwardWorkspace {
  explicit BackwardWorkspace(const CudaPlan& plan);
  int64_t rows, gain, grad, row_dot, col_sums, dx, totals, arranged, arranged_columns, weight, size;
};

// A block's tile sizes, known to the kernels too.
constexpr int64_t kLargeTile = 128, kSmallTile = 64, kClassTile = 64, kFeatureTile = 128,
                  kGradientRows = 128;
constexpr int64_t kRowParts = 4;  // partial row sums of a class tile's gradient: one a warp column
constexpr int64_t kStepBytes = 64;  // of a feature row in one step of the main loop
// The same of Hopper's kernels: a block's cosines and its 16-bit products.
constexpr int64_t kHopperRows = 256, kHopperProductRows = 128, kHopperProductCols = 256,
                  kHopperDepth = 64;

// Shared memory of class_gradient without its resident tile.
constexpr int64_t gradient_shared_bytes(Math math) { return math == Math::kF64 ? 55872 : 52544; }

// Partial sums of a row and of all, over all chunks.
int64_t dot_slots(const CudaPlan& plan);
int64_t total_count(const CudaPlan& plan);

CudaPlan plan_cuda(const CudaProblem& problem, const Gpu& gpu);

// What the prediction takes the plan's kernels to reach.
double flop_rate(const CudaPlan& plan, const Gpu& gpu);
double l2_rate(const CudaPlan& plan, const Gpu& gpu);

}  // namespace tvmf
