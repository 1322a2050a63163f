// The plan of Hopper's own kernels: tensor copies and wgmma, compute capability 9.0, 16-bit
// features with a weight of float32 or of their dtype. Tile sizes are chosen here and used by the
// kernels (sm90/mainloop.cuh).
#pragma once

#include "cuda/rows/workspace.h"
#include "cuda/sm90/schedule.h"

namespace tvmf::sm90 {

constexpr int kCosineRows = 256;                        // rows of a tile of cosines
constexpr int kSmallClasses = 64, kLargeClasses = 128;  // its classes
constexpr int kProductRows = 128, kProductCols = 256;   // a tile of dw or of dx
constexpr int kAtom = 64;   // 16-bit elements of a line of 128 bytes, within which copies swizzle
constexpr int kDepth = 64;  // elements of a row in one step of the main loops

static_assert(kCosineRows <= kLargestTile && kProductRows <= kLargestTile);

// The blocks of kept_gradient and their tiles. A warp has 16 classes and 32 rows at a time.
constexpr int kKeptThreads = 512, kKeptWarps = kKeptThreads / 32, kWarpClasses = 16;
struct KeptTiles {
  int row_warps, class_warps;  // a tile has all rows; its classes are split among class_warps
  int tiles, blocks;

  TVMF_HOST_DEVICE int classes() const { return class_warps * kWarpClasses; }
};

struct Plan {
  Math math;
  bool small_tiles;    // cosines in tiles of 64 classes instead of 128
  bool narrow_weight;  // of the features' dtype, not float32

  // Each pass works on one segment of rows after another, in the same workspace. Everything below
  // is of one segment. The gradients of the classes are summed over segments in their own memory.
  int64_t segments, segment_rows;

  // The features, arranged in the order in which the lanes read them (sm90/arrange.cuh).
  int64_t arranged_rows, arranged_columns;

  // Cosines: row_blocks x class_tiles tiles. Persistent blocks share the class tiles of their rows.
  int64_t row_blocks, class_tiles;
  int64_t statistics_blocks, gradient_blocks;  // persistent blocks for each block of rows
  bool merges_rows;  // whether the last block of statistics does the work of finish_rows
  int64_t blocks;    // persistent blocks that run at the same time

  // Backward pass: `chunk` classes at a time.
  int64_t chunk, chunks;
  int64_t gradient_stride, weight_stride;  // of ClassMajorGradient and RoundedWeights, in elements

  // Where the forward pass keeps products (kept_products), their gradients take one chunk, and
  // elements for each row are saved. Otherwise `kept` is 0.
  int64_t kept;
  KeptTiles kept_tiles;
  int64_t column_slots;      // partial sums of a class over its rows
  int64_t partial_features;  // partial sums of dx

  // The plan of a segment of so many rows, which may be fewer than segment_rows.
  Plan of_rows(int64_t rows) const {
    Plan plan = *this;
    plan.arranged_rows = round_up(rows, 32);
    plan.row_blocks = ceil_div(rows, kCosineRows);
    plan.column_slots = plan.slots();
    return plan;
  }
  // The segment that begins at row i * segment_rows, of N.
  int64_t rows_of(int64_t i, int64_t N) const {
    return i + 1 < segments ? segment_rows : N - i * segment_rows;
  }

  ProductSchedule schedule_of(int64_t rows, int64_t D, int64_t classes) const {
    return make_schedule(rows, D, classes, blocks, partial_features);
  }
  bool keeps() const { return kept > 0; }
  int64_t slots() const { return keeps() ? 1 : row_blocks * (small_tiles ? 2 : 1); }
  // Whether the products of the gradients have unit rows of the features and of the weight.
  bool unit_features() const { return keeps() || math == Math::kF16; }
  bool unit_weights() const { return !keeps() || math == Math::kF16; }
  bool adds_gradients() const { return segments > 1; }
  int64_t tile_classes() const { return small_tiles ? kSmallClasses : kLargeClasses; }
  rows::PartialCounts partial_counts() const {
    // Each of the 8 consumer warps of a block has totals, or a whole block of kept_gradient.
    return {0, partial_features, keeps() ? kept_tiles.blocks : row_blocks * gradient_blocks * 8};
  }
};

// What Saved::product has where products are kept: [C, stride] float, and of each class's 32 rows
// the first four of every eight before the others, so that lanes with 8 rows each store and load
// whole sectors (kept_half); then float32 weights as they were rounded, in the features' dtype.
// Weights of the features' dtype are not copied.
struct KeptLayout {
  KeptLayout(const CudaProblem& problem);
  int64_t stride;         // N, rounded up to 32
  int64_t weight;         // byte offset of the weights, as RoundedWeights
  int64_t weight_stride;  // D, rounded up to 8
  int64_t bytes;
};

struct ForwardWorkspace {
  ForwardWorkspace(const CudaProblem& problem, const Plan& plan);
  rows::ForwardWorkspace rows;
  int64_t arranged;
  int64_t size;
};

struct BackwardWorkspace {
  BackwardWorkspace(const CudaProblem& problem, const Plan& plan);
  rows::BackwardWorkspace rows;
  int64_t gradient;                    // ClassMajorGradient
  int64_t column_sums;                 // [column_slots, 3, chunk] float
  int64_t arranged, arranged_columns;  // ArrangedRows
  int64_t weight;                      // RoundedWeights
  int64_t size;
};

// The problem of the first `rows` rows.
inline CudaProblem first_rows(CudaProblem problem, int64_t rows) {
  problem.N = rows;
  return problem;
}

// Whether these kernels serve the problem: the GPU has the instructions and this build their code,
// the dtypes are theirs, and tensor copies can read the weight where it lies.
bool serves(const CudaProblem& problem, const Gpu& gpu);
// What the forward pass keeps: products and rounded weights, so that the backward pass multiplies
// twice instead of three times.
KeptProducts kept_products(const CudaProblem& problem, const Gpu& gpu);
// A test can ask for segments of at most `most_rows` rows.
Plan make_plan(const CudaProblem& problem, const Gpu& gpu, int64_t most_rows = kMostRows);
Memory memory_of(const CudaProblem& problem, const Plan& plan);

// Instructions that an element of a tile takes in the epilogues of the cosines, from one group of
// 32 rows to the next, in a tile without a target. They are counted in the code that nvcc makes,
// and the predicted time alone depends on them.
struct EpilogueInstructions {
  double statistics = 11.1, gradient = 15.9;
  double kept_gradient = 23.8;  // of all that belongs to 32 rows
};
Cost cost_of(const CudaProblem& problem, const Plan& plan, const Gpu& gpu,
             const EpilogueInstructions& instructions = {});
std::vector<PlanField> fields_of(const Plan& plan);

}  // namespace tvmf::sm90
