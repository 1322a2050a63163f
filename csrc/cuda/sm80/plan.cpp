#include "cuda/sm80/plan.h"

#include <algorithm>

namespace tvmf::sm80 {
namespace {

// Bytes that each class of a chunk takes in the L2 cache: its gradient tile and its weights.
int64_t cached_bytes(const CudaProblem& p) {
  return p.N * size_of(p.x) + p.D * size_of(p.weight());
}
int64_t usable_cache(const Gpu& gpu) { return gpu.l2 * 7 / 10; }

// Classes of a chunk: as many as leave its tile and weights in the cache and bound its part of the
// workspace, in whole waves of blocks.
int64_t chunk_of(const CudaProblem& p, const Gpu& gpu) {
  const int64_t acc = accumulator_size(p.x), row_groups = ceil_div(p.N, kGradientRows);
  const int64_t bytes = p.N * size_of(p.x) + p.N * acc * kRowParts / kClassTile +
                        row_groups * (3 * acc + 16 / kClassTile + 1);
  const int64_t chunk = std::min(usable_cache(gpu) / cached_bytes(p), 28 * kMiB / bytes);
  const int64_t wave = gpu.sms * kClassTile;
  const int64_t whole = chunk > wave ? chunk / wave * wave : chunk / kClassTile * kClassTile;
  return std::min(std::max(whole, kClassTile), round_up(p.C, kClassTile));
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
  const bool tensor_cores = plan.math != Math::kF32 && plan.math != Math::kF64;
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
  const int64_t all_tiles = ceil_div(p.C, kClassTile);
  const int64_t resident_bytes = round_up(p.N, kGradientRows) * kClassTile * size_of(p.x);
  const int64_t block_bytes = gradient_shared_bytes(plan.math) + resident_bytes;
  const bool fits = block_bytes <= gpu.shared_per_block &&
                    (all_tiles <= gpu.sms || 2 * (block_bytes + 1024) <= gpu.shared_per_sm);
  plan.latency = latency && (fits || (p.N <= 1024 && all_tiles >= gpu.sms));
  plan.resident = plan.latency && fits;
  plan.chunk = plan.latency ? round_up(p.C, kClassTile) : chunk_of(p, gpu);
  plan.chunks = ceil_div(p.C, plan.chunk);
  const int64_t chunk_tiles = plan.chunk / kClassTile;
  const int64_t feature_tiles = ceil_div(p.D, kFeatureTile);
  // Blocks that share a resident tile's weight gradient each make the tile. That pays only where
  // the products were kept and need not be made again.
  const bool shared = !plan.latency || (plan.resident && plan.kept > 0);
  plan.feature_splits = splits_of(chunk_tiles, shared ? feature_tiles : 1, gpu);
  plan.row_groups = plan.latency ? 1 : splits_of(chunk_tiles, ceil_div(p.N, kGradientRows), gpu);

  const int64_t steps = ceil_div(plan.chunk, step);
  const int64_t partial_bytes = std::max<int64_t>(p.N * p.D * acc, 1);  // of one partial dx
  const int64_t most =
      std::clamp<int64_t>(std::min(steps / 4, 16 * kMiB / partial_bytes), 1, 65535);
  const int64_t large_tiles = tiles_of(p.N, p.D, kLargeTile);
  plan.input_tile = tensor_cores && large_tiles * most >= gpu.sms ? kLargeTile : kSmallTile;
  plan.input_splits = splits_of(tiles_of(p.N, p.D, plan.input_tile), most, gpu);
  return plan;
}

PassCost forward_cost(const CudaProblem& p, const Plan& plan, const Gpu& gpu) {
  const double N = double(p.N), C = double(p.C), D = double(p.D), kept = double(plan.kept);
  const double x = double(size_of(p.x)), w = double(size_of(p.weight()));
  const double acc = double(accumulator_size(p.x)), splits = double(plan.class_splits);
  PassCost pass;
  pass.launches = 3 + (rows::finish_block_rows(p.N, plan.class_splits) < p.N);
  pass.workspace = ForwardWorkspace(p, plan).size;
  pass.flops = 2 * N * C * D;
  // Blocks that run at the same time walk the same classes, so that the weights cross the memory
  // interface once for each wave of blocks.
  const double waves = tiles(plan.row_tiles * plan.class_splits, 2 * gpu.sms);
  pass.hbm = waves * C * D * w + N * D * x + N * kept * acc;
  const double prepare = N * D * (x + w) + 6 * N * kSectorBytes;
  const double statistics = tiles(p.C, plan.tile) * N * D * x + tiles(p.N, plan.tile) * C * D * w +
                            N * kept * acc + splits * N * (5 * acc + 12) + C * acc +
                            N * kSectorBytes;
  const double finish_rows = splits * N * (3 * acc + 4) + N * (4 * acc + 8);
  pass.l2 = prepare + statistics + finish_rows;
  return pass;
}

PassCost backward_cost(const CudaProblem& p, const Plan& plan, const Gpu& gpu) {
  const double N = double(p.N), C = double(p.C), D = double(p.D), kept = double(plan.kept);
  const double x = double(size_of(p.x)), w = double(size_of(p.weight()));
  const double acc = double(accumulator_size(p.x)), x_pair = std::max(x, 4.0);
  const double w_pair = std::max(w, 4.0), chunks = double(plan.chunks);
  const double input_splits = double(plan.input_splits);
  PassCost pass;
  pass.launches = plan.latency ? 4 : 2 + 3 * plan.chunks;
  pass.workspace = BackwardWorkspace(p, plan).size;
  // On the latency path each block that shares a weight gradient makes the gradient tile.
  const double makers = plan.latency ? double(plan.feature_splits) : 1;
  pass.flops = (kept > 0 ? 4 : 4 + 2 * makers) * N * C * D;
  // The weights are read for the cosines, the projection and dx: from memory once, if the chunk
  // stays in the cache.
  const bool cached = cached_bytes(p) * plan.chunk <= usable_cache(gpu);
  const double reads = cached ? 1 : kept > 0 ? 2 : 3;
  pass.hbm =
      C * D * (reads * w + w) + N * D * (x + x) + N * kept * acc + (cached ? 0 : 2 * N * C * x);
  const double class_tiles = tiles(p.C, kClassTile), row_parts = double(kRowParts);
  // Each load of 16 bytes of a GradientRow takes a sector of its own.
  const double row_terms = double(round_up(5 * int64_t(acc) + 8, 16)) / 16 * kSectorBytes;
  const double cosines =
      kept > 0 ? N * C * acc : class_tiles * N * D * x + tiles(p.N, kGradientRows) * C * D * w;
  const double gradient = makers * (cosines + class_tiles * row_parts * N * row_terms) +
                          N * C * x_pair + class_tiles * row_parts * N * acc * (2 - 1 / chunks);
  const double weight = class_tiles * N * D * x + C * D * (w_pair + w_pair) +
                        (plan.resident ? 0 : tiles(p.D, kFeatureTile) * N * C * x);
  const double input = tiles(p.D, plan.input_tile) * N * C * x +
                       tiles(p.N, plan.input_tile) * C * D * w +
                       input_splits * N * D * acc * (2 * chunks - 1);
  // Of a block's rows, finish_gradient reads each partial sum in one sector and its own terms in
  // eight. Four numbers of float64 are two loads, each of which takes both sectors.
  const double finish_blocks = tiles(p.N, rows::rows_to_finish(p.N, p.D));
  const double row_dots = double(plan.partial_counts().row_dots), loads = acc == 8 ? 2 : 1;
  const double finish = loads * (input_splits * N * D * acc + N * D * x) + N * D * x +
                        finish_blocks * (row_dots + 8) * kSectorBytes;
  pass.l2 = N * (27 * acc + 8) + gradient + weight + input + finish;
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
  size = cursor.at;
}

Plan make_plan(const CudaProblem& problem, const Gpu& gpu) {
  const bool small = problem.N * problem.C * 4 <= kWorkspaceBudget;
  const Plan plan = plan_for(problem, small, gpu);
  if (BackwardWorkspace(problem, plan).size <= kWorkspaceBudget) return plan;
  return plan_for(problem, false, gpu);
}

Cost cost_of(const CudaProblem& problem, const Plan& plan, const Gpu& gpu) {
  Cost cost;
  cost.flop_rate = gpu.flop_rate[int(plan.math)];
  cost.l2_rate = gpu.l2_rate;
  cost.saved = SavedLayout(problem.N, problem.C, plan.kept).size * accumulator_size(problem.x);
  cost.forward = forward_cost(problem, plan, gpu);
  cost.backward = backward_cost(problem, plan, gpu);
  predict(cost.forward, cost, gpu);
  predict(cost.backward, cost, gpu);
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
