#include "cuda/sm80/plan.h"

#include <algorithm>
#include <cmath>

#include "cuda/rows/cost.h"

namespace tvmf::sm80 {
namespace {

// Bytes of a UnitRow, which float16 products with the gradient have as an operand.
int64_t unit_row_bytes(const CudaProblem& p) {
  return p.x == DType::kFloat16 ? round_up(p.D, 8) * 2 : 0;
}
// Bytes that each class of a chunk takes in the L2 cache: its gradient tile and its weights.
int64_t cached_bytes(const CudaProblem& p) {
  return p.N * size_of(p.x) + p.D * size_of(p.weight()) + unit_row_bytes(p);
}
int64_t usable_cache(const Gpu& gpu) { return gpu.l2 * 7 / 10; }

// Classes of a chunk in whole tiles: as many as leave its tile and weights in the cache and bound
// its part of the workspace, in whole waves of small tiles.
int64_t chunk_of(const CudaProblem& p, int64_t tile, const Gpu& gpu) {
  const int64_t acc = accumulator_size(p.x), row_groups = ceil_div(p.N, kGradientRows);
  const int64_t bytes = p.N * size_of(p.x) + p.N * acc * row_parts(p.math()) / tile +
                        row_groups * (3 * acc + 1) + unit_row_bytes(p);
  const int64_t chunk = std::min(usable_cache(gpu) / cached_bytes(p), 28 * kMiB / bytes);
  const int64_t wave = round_up(gpu.sms * kSmallTile, tile);
  const int64_t whole = chunk > wave ? chunk / wave * wave : chunk / tile * tile;
  return std::min(std::max(whole, tile), round_up(p.C, tile));
}

// The number of parts, at most `most`, into which each of `blocks` blocks is split so that a
// multiprocessor has about two.
int64_t splits_of(int64_t blocks, int64_t most, const Gpu& gpu) {
  return std::clamp<int64_t>(2 * gpu.sms / std::max<int64_t>(blocks, 1), 1, most);
}

double tiles(int64_t size, int64_t tile) { return double(ceil_div(size, tile)); }

Plan plan_for(const CudaProblem& p, bool latency, const Gpu& gpu) {
  Plan plan{};
  plan.math = p.math();
  plan.kept = p.kept_products();
  const int64_t acc = accumulator_size(p.x), step = kStepBytes / size_of(p.x);
  const bool tensor_cores = on_tensor_cores(plan.math);
  const auto tiles_of = [](int64_t rows, int64_t cols, int64_t tile) {
    return ceil_div(rows, tile) * ceil_div(cols, tile);
  };

  // Large tiles load half the bytes. They are used where nearly every multiprocessor gets one.
  const bool large = tensor_cores && tiles_of(p.N, p.C, kLargeTile) * 4 >= gpu.sms * 3;
  plan.tile = large ? kLargeTile : kSmallTile;
  plan.row_tiles = ceil_div(p.N, plan.tile);
  const int64_t class_tiles = ceil_div(p.C, plan.tile);
  plan.tiles_per_split = ceil_div(class_tiles, splits_of(plan.row_tiles, class_tiles, gpu));
  plan.class_splits = ceil_div(class_tiles, plan.tiles_per_split);

  // The gradient tile of all rows stays in shared memory where two blocks still fit on a
  // multiprocessor, so that one multiplies while the other waits, or where each multiprocessor has
  // but one block. A latency plan without it needs a block for every multiprocessor, since blocks
  // can share a weight gradient only if each has the tile.
  const int64_t all_tiles = ceil_div(p.C, kSmallTile);
  const int64_t resident_bytes = round_up(p.N, kGradientRows) * kSmallTile * size_of(p.x);
  const bool rounded = tensor_cores && size_of(p.weight()) > size_of(p.x);
  const int64_t block_bytes = gradient_shared_bytes(plan.math, rounded) + resident_bytes;
  const bool fits = block_bytes <= gpu.shared_per_block &&
                    (all_tiles <= gpu.sms || 2 * (block_bytes + 1024) <= gpu.shared_per_sm);
  plan.latency = latency && (fits || (p.N <= 1024 && all_tiles >= gpu.sms));
  plan.resident = plan.latency && fits;
  // Large tiles of classes read half the bytes of features. Only the throughput path has them,
  // where two blocks fit on a multiprocessor, and where both of its launches have a block for
  // nearly every multiprocessor.
  const int64_t row_tiles = ceil_div(p.N, kGradientRows);
  const int64_t feature_tiles = ceil_div(p.D, kFeatureTile);
  const int64_t large_chunk = chunk_of(p, kLargeTile, gpu);
  const bool large_classes =
      has_large_classes(plan.math) && !plan.latency &&
      2 * (kLargeGradientBytes + 1024) <= gpu.shared_per_sm &&
      large_chunk / kLargeTile * std::min(row_tiles, feature_tiles) * 4 >= gpu.sms * 3;
  plan.class_tile = large_classes ? kLargeTile : kSmallTile;
  plan.chunk = plan.latency    ? round_up(p.C, kSmallTile)
               : large_classes ? large_chunk
                               : chunk_of(p, kSmallTile, gpu);
  plan.chunks = ceil_div(p.C, plan.chunk);
  const int64_t chunk_tiles = plan.chunk / plan.class_tile;
  // Blocks that share a resident tile's weight gradient each make the tile. That pays only where
  // the products were kept and need not be made again.
  const bool shared = !plan.latency || (plan.resident && plan.kept > 0);
  plan.feature_splits = splits_of(chunk_tiles, shared ? feature_tiles : 1, gpu);
  plan.row_groups = plan.latency ? 1 : splits_of(chunk_tiles, row_tiles, gpu);

  const int64_t steps = ceil_div(plan.chunk, step);
  const int64_t partial_bytes = std::max<int64_t>(p.N * p.D * acc, 1);  // of one partial dx
  const int64_t most =
      std::clamp<int64_t>(std::min(steps / 4, 16 * kMiB / partial_bytes), 1, 65535);
  const int64_t large_tiles = tiles_of(p.N, p.D, kLargeTile);
  plan.input_tile = tensor_cores && large_tiles * most >= gpu.sms ? kLargeTile : kSmallTile;
  plan.input_splits = splits_of(tiles_of(p.N, p.D, plan.input_tile), most, gpu);
  return plan;
}

// A kernel whose blocks make products: the time of the multiprocessor that has the most blocks. The
// rates of this path include the elementwise work.
KernelCost block_kernel(KernelCost kernel, double blocks, const Plan& plan, const Gpu& gpu) {
  const double launches = double(kernel.launches);
  const double rounds = std::ceil(blocks / double(gpu.sms));
  const double block_seconds =
      kernel.flops / (launches * blocks) * double(gpu.sms) / gpu.flop_rate[int(plan.math)];
  kernel.products = launches * rounds * block_seconds;
  kernel.between = launches * (rounds - 1) * KernelCost::kTile * gpu.wait_seconds;
  kernel.alone = launches * (KernelCost::kStart + KernelCost::kTile) * gpu.wait_seconds;
  return kernel;
}

PassCost forward_cost(const CudaProblem& p, const Plan& plan, const Gpu& gpu) {
  const double N = double(p.N), C = double(p.C), D = double(p.D), kept = double(plan.kept);
  const double x = double(size_of(p.x)), w = double(size_of(p.weight()));
  const double acc = double(accumulator_size(p.x)), splits = double(plan.class_splits);
  // Where float32 weights are rounded to float16, prepare_rows reads them first: those of a class
  // twice, and those of a target four times more.
  const bool unit_weights = p.x == DType::kFloat16 && p.weight() == DType::kFloat32;
  KernelCost prepare = rows::prepare_cost(
      p, 0,
      N * D * (x + w) + 6 * N * kSectorBytes + unit_weights * ((2 * C + 4 * N) * D * w + C * acc),
      gpu);
  prepare.hbm = unit_weights * C * D * w + N * D * x;

  // Blocks that run at the same time walk the same classes, so that the weights cross the memory
  // interface once for each wave of blocks.
  const double blocks = double(plan.row_tiles * plan.class_splits);
  const double waves = std::ceil(blocks / double(2 * gpu.sms));
  const KernelCost statistics{.name = "row_statistics",
                              .launches = 1,
                              .flops = 2 * N * C * D,
                              .hbm = waves * C * D * w + N * kept * acc,
                              .l2 = tiles(p.C, plan.tile) * N * D * x +
                                    tiles(p.N, plan.tile) * C * D * w + N * kept * acc +
                                    splits * N * (5 * acc + 12) + C * acc + N * kSectorBytes};
  PassCost pass;
  pass.kernels = {prepare, block_kernel(statistics, blocks, plan, gpu)};
  pass.kernels.push_back(rows::finish_cost(
      p, plan.class_splits, splits * N * (3 * acc + 4) + N * (4 * acc + 8), true, false, gpu));
  return pass;
}

PassCost backward_cost(const CudaProblem& p, const Plan& plan, const Gpu& gpu) {
  const double N = double(p.N), C = double(p.C), D = double(p.D), kept = double(plan.kept);
  const double x = double(size_of(p.x)), w = double(size_of(p.weight()));
  const double acc = double(accumulator_size(p.x)), x_pair = std::max(x, 4.0);
  const double w_pair = std::max(w, 4.0), chunks = double(plan.chunks);
  const double input_splits = double(plan.input_splits);
  const bool float16 = p.x == DType::kFloat16;
  // On the latency path each block that shares a weight gradient makes the gradient tile.
  const double makers = plan.latency ? double(plan.feature_splits) : 1;
  // The weights are read for the cosines, the projection and dx: from memory once, if the chunk
  // stays in the cache. So is the gradient tile, which is written first.
  const bool cached = cached_bytes(p) * plan.chunk <= usable_cache(gpu);
  const double again = cached ? 0 : C * D * w, tile_bytes = cached ? 0 : N * C * x;
  const double class_tiles = tiles(p.C, plan.class_tile), parts = double(row_parts(plan.math));
  const double chunk_tiles = double(plan.chunk / plan.class_tile);
  // A GradientRow is read for each kSmallTile classes of a warp row. Each load of 16 bytes of it
  // takes a sector of its own.
  const double row_terms = double(plan.class_tile / kSmallTile) *
                           double(round_up(5 * int64_t(acc) + 8, 16)) / 16 * kSectorBytes;
  const double cosines =
      kept > 0 ? N * C * acc : class_tiles * N * D * x + tiles(p.N, kGradientRows) * C * D * w;

  const KernelCost gradient{.name = "class_gradient",
                            .launches = plan.chunks,
                            .flops = kept > 0 ? 0 : 2 * makers * N * C * D,
                            .hbm = (kept > 0 ? 0 : C * D * w) + N * kept * acc + tile_bytes,
                            .l2 = makers * (cosines + class_tiles * parts * N * row_terms) +
                                  N * C * x_pair +
                                  class_tiles * parts * N * acc * (2 - 1 / chunks)};
  const KernelCost weight{.name = "class_gradient+weight",
                          .launches = plan.chunks,
                          .flops = 2 * N * C * D,
                          .hbm = C * D * w + (kept > 0 ? C * D * w : again) + tile_bytes,
                          .l2 = class_tiles * N * D * x + C * D * (w_pair + w_pair) +
                                (plan.resident ? 0 : tiles(p.D, kFeatureTile) * N * C * x)};
  KernelCost input{.name = "input_gradient",
                   .launches = plan.chunks,
                   .flops = 2 * N * C * D,
                   .hbm = again + tile_bytes,
                   .l2 = tiles(p.D, plan.input_tile) * N * C * x +
                         tiles(p.N, plan.input_tile) * C * D * (float16 ? x : w) +
                         input_splits * N * D * acc * (2 * chunks - 1)};
  const double input_blocks =
      tiles(p.N, plan.input_tile) * tiles(p.D, plan.input_tile) * input_splits;
  // Of a block's rows, finish_gradient reads each partial sum in one sector and its own terms in
  // eight. Four numbers of float64 are two loads, each of which takes both sectors.
  const double finish_blocks = tiles(p.N, rows::rows_to_finish(p.N, p.D));
  const double row_dots = double(plan.partial_counts().row_dots), loads = acc == 8 ? 2 : 1;
  KernelCost prepare =
      rows::prepare_gradient_cost(p, N * (27 * acc + 8) + (float16 ? N * D * (x + x) : 0), gpu);
  prepare.hbm = N * D * x;
  KernelCost finish =
      rows::finish_gradient_cost(p,
                                 loads * (input_splits * N * D * acc + N * D * x) + N * D * x +
                                     finish_blocks * (row_dots + 8) * kSectorBytes,
                                 gpu);
  finish.hbm = N * D * x;

  PassCost pass;
  pass.kernels.push_back(prepare);
  if (plan.latency) {  // one launch makes both
    KernelCost both = gradient;
    both.flops += weight.flops;
    both.hbm += weight.hbm;
    both.l2 += weight.l2;
    pass.kernels.push_back(block_kernel(both, chunk_tiles * plan.feature_splits, plan, gpu));
  } else {
    pass.kernels.push_back(block_kernel(gradient, chunk_tiles * plan.row_groups, plan, gpu));
    pass.kernels.push_back(block_kernel(weight, chunk_tiles * plan.feature_splits, plan, gpu));
  }
  // Loads of 8 float32 weights take two accesses, each of all sectors.
  if (float16)
    pass.kernels.push_back({.name = "unit_rows",
                            .launches = plan.chunks,
                            .l2 = C * D * (w == 4 ? 2 * w + x : w + x),
                            .alone = chunks * gpu.wait_seconds});
  pass.kernels.push_back(block_kernel(input, input_blocks, plan, gpu));
  pass.kernels.push_back(finish);
  return pass;
}

}  // namespace

ForwardWorkspace::ForwardWorkspace(const CudaProblem& problem, const Plan& plan) {
  Cursor cursor;
  rows = rows::ForwardWorkspace::take(cursor, problem, plan.class_splits);
  size = cursor.at;
}

BackwardWorkspace::BackwardWorkspace(const CudaProblem& problem, const Plan& plan) {
  const int64_t slots = plan.latency ? plan.feature_splits : plan.row_groups;
  Cursor cursor;
  rows = rows::BackwardWorkspace::take(cursor, problem, plan.partial_counts());
  gradient = cursor.take(problem.N * plan.chunk * size_of(problem.x));
  column_sums = cursor.take(slots * 3 * plan.chunk * accumulator_size(problem.x));
  const int64_t unit_row = unit_row_bytes(problem);
  unit_x = cursor.take(problem.N * unit_row);
  unit_weight = cursor.take(plan.chunk * unit_row);
  size = cursor.at;
}

Plan make_plan(const CudaProblem& problem, const Gpu& gpu) {
  const bool small = problem.N * problem.C * 4 <= kWorkspaceBudget;
  const Plan plan = plan_for(problem, small, gpu);
  if (BackwardWorkspace(problem, plan).size <= kWorkspaceBudget) return plan;
  return plan_for(problem, false, gpu);
}

Memory memory_of(const CudaProblem& problem, const Plan& plan) {
  const SavedLayout saved(problem.N, problem.C, plan.kept);
  return {.saved = saved.size * accumulator_size(problem.x),
          .forward = ForwardWorkspace(problem, plan).size,
          .backward = BackwardWorkspace(problem, plan).size};
}

Cost cost_of(const CudaProblem& problem, const Plan& plan, const Gpu& gpu) {
  Cost cost{forward_cost(problem, plan, gpu), backward_cost(problem, plan, gpu)};
  predict(cost.forward, gpu);
  predict(cost.backward, gpu);
  return cost;
}

std::vector<PlanField> fields_of(const Plan& plan) {
  return {
      {"architecture", "sm80"},
      {"kept", plan.kept},
      {"latency", plan.latency},
      {"tile", plan.tile},
      {"row_tiles", plan.row_tiles},
      {"class_splits", plan.class_splits},
      {"tiles_per_split", plan.tiles_per_split},
      {"class_tile", plan.class_tile},
      {"chunk", plan.chunk},
      {"chunks", plan.chunks},
      {"resident", plan.resident},
      {"row_groups", plan.row_groups},
      {"feature_splits", plan.feature_splits},
      {"input_tile", plan.input_tile},
      {"input_splits", plan.input_splits},
  };
}

}  // namespace tvmf::sm80
