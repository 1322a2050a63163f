#include "cuda/sm90/plan.h"

#include <algorithm>

namespace tvmf::sm90 {
namespace {

// Tensor copies take 32-bit offsets, so every class and the part of a tile that lies beyond the
// last class must have an index below 2^31.
constexpr int64_t kMostClasses = (int64_t(1) << 31) - 1024;

double tiles(int64_t size, int64_t tile) { return double(ceil_div(size, tile)); }

// Bytes that the arranged features take.
double arranged_bytes(const Plan& plan) {
  return double(plan.arranged_rows) * double(plan.arranged_columns) * 2;
}

// Bytes that the tiles of cosines load.
double cosine_bytes(const CudaProblem& p, const Plan& plan) {
  return double(plan.row_blocks) * double(p.C) * double(p.D) * 4 +
         double(plan.class_tiles) * arranged_bytes(plan);
}

PassCost forward_cost(const CudaProblem& p, const Plan& plan) {
  const double N = double(p.N), C = double(p.C), D = double(p.D), x = 2, w = 4, acc = 4;
  const double splits = double(plan.statistics_blocks);
  PassCost pass;
  pass.launches = 3 + (rows::finish_block_rows(p.N, plan.statistics_blocks) < p.N);
  pass.workspace = ForwardWorkspace(p, plan).size;
  pass.flops = 2 * N * C * D;
  // Where the weights are rounded to float16, prepare_rows reads them first: those of a class
  // twice, and those of a target four times more.
  const double first = p.x == DType::kFloat16 ? 1 : 0;
  pass.hbm = (1 + first) * C * D * w + N * D * x;
  // To arrange the features, every sector of a row is read four times.
  const double prepare = N * D * (x + w) + 4 * N * D * x + arranged_bytes(plan) +
                         10 * N * kSectorBytes + first * (2 * C + 4 * N) * D * w;
  pass.l2 =
      prepare + cosine_bytes(p, plan) + splits * N * (p.with_sum ? 48 : 40) + N * 20 + C * acc;
  return pass;
}

PassCost backward_cost(const CudaProblem& p, const Plan& plan, const Gpu& gpu) {
  const double N = double(p.N), C = double(p.C), D = double(p.D), x = 2, w = 4, acc = 4;
  const double chunks = double(plan.chunks), input_splits = double(plan.input_splits);
  const double slots = double(plan.column_slots), blocks = double(plan.gradient_blocks);
  PassCost pass;
  pass.launches = 2 + 3 * plan.chunks;
  pass.workspace = BackwardWorkspace(p, plan).size;
  pass.flops = 6 * N * C * D;
  // If a chunk stays in the cache, its weights and their gradient cross the memory interface once,
  // and its gradient tile and rounded weights never. Otherwise these are written and read again.
  const double cached_bytes = 2 * double(plan.chunk) * (N + 3 * D);
  const bool cached = cached_bytes <= double(gpu.l2 * 7 / 10);
  pass.hbm = C * D * (w + w) + N * D * (x + x) + (cached ? 0 : C * D * x + 2 * C * (N + D) * x);
  // To arrange the features in both orders, every sector of a row is read twelve times.
  const double arrange = 12 * N * D * x + 2 * arranged_bytes(plan) + 4 * N * kSectorBytes;
  const double gradient = cosine_bytes(p, plan) + C * (N + D) * x +
                          chunks * blocks * N * 3 * kSectorBytes + C * acc * (4 * slots);
  const double columns = tiles(p.D, kProductCols);
  const double weight = columns * N * C * x + tiles(p.C, kProductRows) * N * D * x +
                        C * D * (x + w) + C * acc * (2 + slots);
  const double features = columns * N * C * x + tiles(p.N, kProductRows) * C * D * x +
                          input_splits * N * D * acc * (2 * chunks - 1);
  const double finish =
      input_splits * N * D * acc + N * D * (x + x) + N * D / 2 + blocks * N * 2 * chunks * acc;
  pass.l2 = arrange + gradient + weight + features + finish;
  return pass;
}

}  // namespace

bool serves(const CudaProblem& p, const Gpu& gpu) {
  // Tensor copies read contiguous rows that begin on 16-byte boundaries. The gradient of the weight
  // is float32, so the caller's weight must be too.
  const WeightLayout& layout = p.layout;
  const bool copied_by_tensor_copies = layout.aligned && layout.col_stride == 1 &&
                                       layout.row_stride >= p.D && layout.row_stride % 4 == 0 &&
                                       p.D % 4 == 0;
  return gpu.capability == 90 && size_of(p.x) == 2 && p.given_weight == DType::kFloat32 &&
         copied_by_tensor_copies && p.C < kMostClasses;
}

ForwardWorkspace::ForwardWorkspace(const CudaProblem& problem, const Plan& plan) {
  Cursor cursor;
  rows = rows::ForwardWorkspace::take(cursor, problem, plan.statistics_blocks);
  arranged = cursor.take(plan.arranged_rows * plan.arranged_columns * 2);
  size = cursor.at;
}

BackwardWorkspace::BackwardWorkspace(const CudaProblem& problem, const Plan& plan) {
  Cursor cursor;
  rows = rows::BackwardWorkspace::take(cursor, problem, plan.partial_counts());
  gradient = cursor.take(plan.chunk * plan.gradient_stride * 2);
  column_sums = cursor.take(plan.column_slots * 3 * plan.chunk * 4);
  arranged = cursor.take(plan.arranged_rows * plan.arranged_columns * 2);
  arranged_columns = cursor.take(problem.N * plan.arranged_columns * 2);
  weight = cursor.take(plan.chunk * plan.weight_stride * 2);
  size = cursor.at;
}

Plan make_plan(const CudaProblem& p, const Gpu& gpu) {
  Plan plan{};
  plan.math = p.math();
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

  const int64_t products = ceil_div(p.N, kProductRows) * ceil_div(p.D, kProductCols);
  const int64_t partial_bytes = std::max<int64_t>(p.N * p.D * 4, 1);  // of one partial dx
  const int64_t most_splits =
      std::clamp<int64_t>(std::min(gpu.sms / products, 16 * kMiB / partial_bytes), 1, 65535);

  // A chunk's gradient and rounded weights have 44 MiB. They get less where the parts that do not
  // depend on the classes would take the workspace over its budget, and never more than the L2
  // cache holds. A chunk is made of whole waves of tiles.
  plan.column_slots = plan.row_blocks * (plan.small_tiles ? 2 : 1);
  const int64_t other_bytes = most_splits * partial_bytes +
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
  plan.input_splits = std::clamp<int64_t>(ceil_div(plan.chunk, kDepth) / 2, 1, most_splits);
  return plan;
}

Cost cost_of(const CudaProblem& problem, const Plan& plan, const Gpu& gpu) {
  Cost cost;
  cost.flop_rate = gpu.own_flop_rate;
  cost.l2_rate = gpu.own_l2_rate;
  cost.saved = SavedLayout(problem.N, problem.C, 0).size * 4;
  cost.forward = forward_cost(problem, plan);
  cost.backward = backward_cost(problem, plan, gpu);
  predict(cost.forward, cost, gpu);
  predict(cost.backward, cost, gpu);
  return cost;
}

std::vector<PlanField> fields_of(const Plan& plan) {
  return {
      {"architecture", "sm90"},
      {"kept", 0},
      {"tile_rows", kCosineRows},
      {"tile_classes", plan.tile_classes()},
      {"row_blocks", plan.row_blocks},
      {"class_tiles", plan.class_tiles},
      {"statistics_blocks", plan.statistics_blocks},
      {"gradient_blocks", plan.gradient_blocks},
      {"product_blocks", plan.blocks},
      {"chunk", plan.chunk},
      {"chunks", plan.chunks},
      {"product_rows", kProductRows},
      {"product_cols", kProductCols},
      {"input_splits", plan.input_splits},
  };
}

}  // namespace tvmf::sm90
