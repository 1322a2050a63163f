#include "cuda/sm90/plan.h"

#include <algorithm>

namespace tvmf::sm90 {
namespace {

// Tensor copies take 32-bit offsets, so every class and the part of a tile that lies beyond the
// last class must have an index below 2^31.
constexpr int64_t kMostClasses = (int64_t(1) << 31) - 1024;

}  // namespace

bool serves(const CudaProblem& p, const Gpu& gpu) {
  // Tensor copies read contiguous rows that begin on 16-byte boundaries. The gradient of the weight
  // has the caller's dtype, so no copy of the weight will do.
  const WeightLayout& layout = p.layout;
  const int64_t run = 16 / size_of(p.given_weight);  // elements of 16 bytes
  const bool copied_by_tensor_copies = layout.aligned && layout.col_stride == 1 &&
                                       layout.row_stride >= p.D && layout.row_stride % run == 0 &&
                                       p.D % 4 == 0;
  return gpu.capability == 90 && size_of(p.x) == 2 &&
         (p.given_weight == DType::kFloat32 || p.given_weight == p.x) && copied_by_tensor_copies &&
         p.C < kMostClasses;
}

KeptLayout::KeptLayout(const CudaProblem& problem)
    : stride(round_up(problem.N, 32)),
      weight(problem.C * stride * 4),
      weight_stride(round_up(problem.D, 8)),
      bytes(weight + (problem.given_weight == problem.x ? 0 : problem.C * weight_stride * 2)) {}

ForwardWorkspace::ForwardWorkspace(const CudaProblem& problem, const Plan& plan) {
  Cursor cursor;
  rows = rows::ForwardWorkspace::take(cursor, first_rows(problem, plan.segment_rows),
                                      plan.statistics_blocks, plan.segments);
  arranged = cursor.take(plan.arranged_rows * plan.arranged_columns * 2);
  size = cursor.at;
}

BackwardWorkspace::BackwardWorkspace(const CudaProblem& problem, const Plan& plan) {
  Cursor cursor;
  rows::PartialCounts counts = plan.partial_counts();
  counts.totals *= plan.segments;
  rows = rows::BackwardWorkspace::take(cursor, first_rows(problem, plan.segment_rows), counts);
  gradient = cursor.take(plan.chunk * plan.gradient_stride * 2);
  column_sums = cursor.take(plan.column_slots * 3 * plan.chunk * 4);
  arranged = cursor.take(plan.keeps() ? 0 : plan.arranged_rows * plan.arranged_columns * 2);
  arranged_columns = cursor.take(plan.segment_rows * plan.arranged_columns * 2);
  weight = cursor.take(plan.keeps() ? 0 : plan.chunk * plan.weight_stride * 2);
  size = cursor.at;
}

namespace {

// A tile of dx has so many parts that all multiprocessors have one, and one more at either end,
// unless their partial sums take more than 24 MiB.
int64_t most_partials(const CudaProblem& p, const Gpu& gpu) {
  const int64_t tiles = ceil_div(p.N, kProductRows) * ceil_div(p.D, kProductCols);
  const int64_t bytes = std::max<int64_t>(p.N * p.D * 4, 1);  // of one partial dx
  return std::max<int64_t>(std::min(gpu.sms / tiles + 3, 24 * kMiB / bytes), 1);
}

Plan plan_for(const CudaProblem& p, int64_t segments, int64_t segment_rows, const Gpu& gpu) {
  Plan plan{};
  plan.segments = segments;
  plan.segment_rows = segment_rows;
  plan.math = p.math();
  plan.narrow_weight = p.given_weight == p.x;
  plan.blocks = gpu.sms;
  plan.arranged_rows = round_up(p.N, 32);
  plan.arranged_columns = round_up(p.D, kDepth);
  plan.gradient_stride = round_up(p.N, 8);
  plan.weight_stride = round_up(p.D, 8);

  // Tiles are small where there are fewer large ones than multiprocessors.
  plan.row_blocks = ceil_div(p.N, kCosineRows);
  plan.small_tiles = plan.row_blocks * ceil_div(p.C, kLargeClasses) < gpu.sms;
  const int64_t classes = plan.tile_classes();
  plan.class_tiles = ceil_div(p.C, classes);
  const int64_t most_blocks = std::max<int64_t>(gpu.sms / plan.row_blocks, 1);
  plan.statistics_blocks = std::min(plan.class_tiles, most_blocks);
  plan.merges_rows = plan.small_tiles && segments == 1 &&
                     rows::finish_block_rows(p.N, plan.statistics_blocks) == p.N;

  plan.partial_features = most_partials(p, gpu);

  // A chunk's gradient and rounded weights have 44 MiB. They get less where the parts that do not
  // depend on the classes would take the workspace over its budget, and never more than the L2
  // cache holds. A chunk is made of whole waves of tiles.
  plan.column_slots = plan.slots();
  const int64_t other_bytes = plan.partial_features * std::max<int64_t>(p.N * p.D * 4, 1) +
                              4 * plan.arranged_rows * plan.arranged_columns + p.N * 48 +
                              plan.row_blocks * most_blocks * 128 + kMiB;
  const int64_t cached = gpu.l2 * 9 / 10;
  const int64_t room = std::clamp(std::min(kWorkspaceBudget - other_bytes, cached),
                                  std::min(16 * kMiB, cached), 44 * kMiB);
  const int64_t class_bytes = 2 * (plan.gradient_stride + plan.weight_stride);
  const int64_t most_tiles =
      std::clamp<int64_t>(room / (class_bytes * classes), 1, plan.class_tiles);
  const bool all = most_tiles == plan.class_tiles;
  const bool waves = most_tiles > most_blocks && !all;
  plan.chunk = (waves ? most_tiles / most_blocks * most_blocks : most_tiles) * classes;
  plan.chunks = ceil_div(p.C, plan.chunk);
  plan.gradient_blocks = std::min(plan.chunk / classes, most_blocks);
  const auto partials = [&](int64_t classes) {
    return load_of(plan.schedule_of(p.N, p.D, classes)).partials;
  };
  const int64_t last_chunk = p.C - (plan.chunks - 1) * plan.chunk;
  plan.partial_features = std::max(partials(std::min(plan.chunk, p.C)), partials(last_chunk));
  return plan;
}

// The rows of which products are kept are few enough for their terms to lie in 48 KiB of shared
// memory with the sums of a tile's classes, beside 64 KiB of products.
constexpr int64_t kMostKeptRows = 1024;

KeptTiles kept_tiles(const CudaProblem& p, const Gpu& gpu) {
  int row_warps = 1;
  while (row_warps < kKeptWarps && row_warps * 32 < p.N) row_warps *= 2;
  // Tiles have fewer classes where there would be fewer tiles than multiprocessors.
  int class_warps = kKeptWarps / row_warps;
  const auto tiles = [&](int warps) { return ceil_div(p.C, warps * kWarpClasses); };
  while (class_warps > 1 && tiles(class_warps / 2) <= gpu.sms) class_warps /= 2;
  const int count = int(tiles(class_warps));
  return {row_warps, class_warps, count, int(std::min<int64_t>(count, gpu.sms))};
}

// The plan of a problem whose products are kept.
Plan kept_plan(const CudaProblem& p, int64_t kept, const Gpu& gpu) {
  Plan plan = plan_for(p, 1, p.N, gpu);
  plan.kept = kept;
  plan.kept_tiles = kept_tiles(p, gpu);
  plan.gradient_blocks = plan.kept_tiles.blocks;
  plan.chunk = plan.class_tiles * plan.tile_classes();
  plan.chunks = 1;
  plan.column_slots = plan.slots();
  plan.partial_features = most_partials(p, gpu);
  plan.partial_features = load_of(plan.schedule_of(p.N, p.D, p.C)).partials;
  return plan;
}

// Whether products are kept, if the caller offers to. It is so for a few rows and small tiles,
// whose kernels alone can keep them, where all that the step holds beside its results stays within
// the workspace's budget: what is kept, and the workspace with all partial sums of dx that are
// wanted. float16 weights lie where they have no room for unit rows, without which the gradient
// tile would leave float16's range.
bool keeps(const CudaProblem& p, const Gpu& gpu) {
  if (p.N > kMostKeptRows || (p.x == DType::kFloat16 && p.given_weight == p.x)) return false;
  const Plan plan = kept_plan(p, 1, gpu);
  return plan.small_tiles &&
         KeptLayout(p).bytes + BackwardWorkspace(p, plan).size <= kWorkspaceBudget;
}

// Segments no shorter than this are split for speed; shorter ones only to save memory.
constexpr int64_t kFewRows = 2048;

}  // namespace

// Memory grows with the rows, but a tile of dx has fewer parts where rows are in more tiles. So the
// rows are tried from the fewest on, 32 at a time, which have the same tiles.
KeptProducts kept_products(const CudaProblem& p, const Gpu& gpu) {
  int64_t rows = 0;
  while (rows < kMostKeptRows && keeps(first_rows(p, rows + 32), gpu)) rows += 32;
  const KeptLayout one_row(first_rows(p, 1));
  return {.most_rows = rows,
          .row_multiple = one_row.stride,
          .beside = (one_row.bytes - one_row.weight) / 4 / std::max<int64_t>(p.C, 1)};
}

// The rows are split into as few segments as leave the workspace within its budget, and a tile of
// the weight's gradient for every multiprocessor: with all of many rows at once, the gradient tile
// of a chunk has room for few classes.
Plan make_plan(const CudaProblem& p, const Gpu& gpu, int64_t most_rows) {
  const bool offered = p.kept > round_up(p.C, kPad) && p.kept * p.N * 4 >= KeptLayout(p).bytes;
  if (offered && p.N <= most_rows && keeps(p, gpu)) return kept_plan(p, p.kept, gpu);
  const int64_t most = ceil_div(std::max<int64_t>(p.N, 1), kCosineRows);
  for (int64_t wanted = 1;; wanted *= 2) {
    const int64_t rows = wanted == 1 ? p.N : round_up(ceil_div(p.N, wanted), kCosineRows);
    const CudaProblem part = first_rows(p, rows);
    const Plan plan = plan_for(part, ceil_div(std::max<int64_t>(p.N, 1), rows), rows, gpu);
    const int64_t bytes = std::max(ForwardWorkspace(p, plan).size, BackwardWorkspace(p, plan).size);
    const int64_t weight_tiles = ceil_div(plan.chunk, kProductRows) * ceil_div(p.D, kProductCols);
    const bool busy = plan.chunks == 1 || rows <= kFewRows || weight_tiles >= gpu.sms;
    const bool fits = bytes <= kWorkspaceBudget && rows <= most_rows;
    if (wanted >= most || (fits && busy)) return plan;
  }
}

Memory memory_of(const CudaProblem& problem, const Plan& plan) {
  const SavedLayout saved(problem.N, problem.C, plan.kept);
  return {.saved = saved.size * accumulator_size(problem.x),
          .forward = ForwardWorkspace(problem, plan).size,
          .backward = BackwardWorkspace(problem, plan).size};
}

std::vector<PlanField> fields_of(const Plan& plan) {
  return {
      {"architecture", "sm90"},
      {"kept", plan.kept},
      {"kept_weights", plan.keeps() && !plan.narrow_weight},
      {"segments", plan.segments},
      {"segment_rows", plan.segment_rows},
      {"tile_rows", kCosineRows},
      {"tile_classes", plan.tile_classes()},
      {"row_blocks", plan.row_blocks},
      {"class_tiles", plan.class_tiles},
      {"statistics_blocks", plan.statistics_blocks},
      {"gradient_classes", plan.keeps() ? plan.kept_tiles.classes() : plan.tile_classes()},
      {"gradient_blocks", plan.gradient_blocks},
      {"product_blocks", plan.blocks},
      {"chunk", plan.chunk},
      {"chunks", plan.chunks},
      {"product_rows", kProductRows},
      {"product_cols", kProductCols},
      {"partial_features", plan.partial_features},
  };
}

}  // namespace tvmf::sm90
