#include "cuda/plan.h"

#include <algorithm>

namespace tvmf {

namespace {

constexpr int64_t kMiB = int64_t(1) << 20;
constexpr int64_t kBudget = 64 * kMiB;  // of a workspace, whatever C is

// Rates, for the prediction alone. Measured on an H200: the copy's 4.3 TB/s; 84 TFLOP/s of a whole
// step by mma.sync with float32 weights, whose kernels are bound by the instructions around it (the
// single products reached 60 to 109); main loops of wgmma alone 677 to 780, with
// 8 TB/s and more from the L2 cache; small kernels of 2.5 to 4 us, their own latency included; 60
// MiB of L2 cache, by the chunks that it made. Of the others mma.sync's 16-bit and TF32 rates are
// the H200's by multiprocessors and clock, the rest is the datasheets' peaks times a guess; none of
// it was measured.
constexpr Gpu kGpus[] = {
    // name, SMs, shared per block, per SM, L2, HBM, L2 rate, {f16, bf16, tf32, f32, f64}, launch,
    // wgmma, its rate, its L2 rate
    {"A100",
     108,
     166912,
     167936,
     40 * kMiB,
     1.3e12,
     3.5e12,
     {60e12, 60e12, 30e12, 15e12, 8e12},
     3e-6},
    {"L40S",
     142,
     101376,
     102400,
     96 * kMiB,
     0.75e12,
     4e12,
     {120e12, 120e12, 60e12, 60e12, 1e12},
     3e-6},
    {"H100",
     132,
     232448,
     233472,
     50 * kMiB,
     3.0e12,
     5.5e12,
     {90e12, 90e12, 45e12, 45e12, 25e12},
     3e-6,
     true,
     650e12,
     8e12},
    {"H200",
     132,
     232448,
     233472,
     60 * kMiB,
     4.3e12,
     5.5e12,
     {90e12, 90e12, 45e12, 45e12, 25e12},
     3e-6,
     true,
     650e12,
     8e12},
    {"B200",
     148,
     232448,
     233472,
     126 * kMiB,
     6.5e12,
     8e12,
     {100e12, 100e12, 50e12, 50e12, 25e12},
     3e-6},
};

// Offsets of what is taken one after another, each on a 256-byte boundary.
struct Cursor {
  int64_t at = 0;
  int64_t take(int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 256);
    return here;
  }
};

int64_t accumulator_size(const CudaPlan& plan) { return plan.math == Math::kF64 ? 8 : 4; }

// Bytes that a chunk has in the L2 cache for each of its classes: gradient tile and weights.
int64_t cached_bytes(const CudaProblem& p) { return p.N * size_of(p.x) + p.D * size_of(p.weight); }
int64_t cache_of(const Gpu& gpu) { return gpu.l2 * 7 / 10; }

// The classes of a chunk: what it has in the cache stays there, its part of the workspace is
// bounded, and its blocks are whole waves.
int64_t chunk_of(const CudaProblem& p, int64_t acc, const Gpu& gpu) {
  const int64_t row_groups = ceil_div(p.N, kGradientRows);
  const int64_t bytes = p.N * size_of(p.x) + p.N * acc * kRowParts / kClassTile +
                        row_groups * (3 * acc + 16 / kClassTile + 1);
  const int64_t chunk = std::min(cache_of(gpu) / cached_bytes(p), 28 * kMiB / bytes);
  const int64_t wave = gpu.sms * kClassTile;
  const int64_t whole = chunk > wave ? chunk / wave * wave : chunk / kClassTile * kClassTile;
  return std::min(std::max(whole, kClassTile), round_up(p.C, kClassTile));
}

// Parts that bring `blocks` up to two a multiprocessor, at most `most`.
int64_t parts(int64_t blocks, int64_t most, const Gpu& gpu) {
  return std::clamp<int64_t>(2 * gpu.sms / std::max<int64_t>(blocks, 1), 1, most);
}

double seconds_of(const CudaPlan& plan, const Gpu& gpu, double flops, double hbm, double l2,
                  double launches) {
  return std::max({flops / flop_rate(plan, gpu), hbm / gpu.hbm_rate, l2 / l2_rate(plan, gpu)}) +
         launches * gpu.launch_seconds;
}

// Bytes between L2 and the multiprocessors are counted in sectors of 32 bytes, as the emulator
// does: one for each scattered access, and two elements of 2 bytes side by side leave half of one
// unused.
void count(CudaPlan& plan, const Gpu& gpu) {
  const CudaProblem& p = plan.problem;
  const double N = double(p.N), C = double(p.C), D = double(p.D), kept = double(p.kept);
  const double x = double(size_of(p.x)), w = double(size_of(p.weight)), sector = 32;
  const double acc = double(accumulator_size(plan)), x_pair = std::max(x, 4.0);
  const double w_pair = std::max(w, 4.0), chunks = double(plan.chunks);
  const auto tiles = [](int64_t size, int64_t tile) { return double(ceil_div(size, tile)); };
  const double splits = double(plan.class_splits), input_splits = double(plan.input_splits);
  const auto seconds = [&](double flops, double hbm, double l2, double launches) {
    return seconds_of(plan, gpu, flops, hbm, l2, launches);
  };

  plan.forward_launches = 3 + (plan.finish_rows < p.N);
  plan.forward_flops = 2 * N * C * D;
  // Blocks that run together walk the same classes: weights cross HBM once for each wave of them.
  const double waves = tiles(plan.row_tiles * plan.class_splits, 2 * gpu.sms);
  plan.forward_hbm = waves * C * D * w + N * D * x + N * kept * acc;
  const double prepare = N * D * (x + w) + 6 * N * sector;
  const double statistics = tiles(p.C, plan.tile) * N * D * x + tiles(p.N, plan.tile) * C * D * w +
                            N * kept * acc + splits * N * (5 * acc + 12) + C * acc + N * sector;
  const double finish_rows = splits * N * (3 * acc + 4) + N * (4 * acc + 8);
  plan.forward_l2 = prepare + statistics + finish_rows;
  plan.forward_seconds =
      seconds(plan.forward_flops, plan.forward_hbm, plan.forward_l2, double(plan.forward_launches));

  plan.backward_launches = plan.latency ? 4 : 2 + 3 * plan.chunks;
  // Blocks that share a weight gradient on the latency path each make the gradient tile.
  const double makers = plan.latency ? double(plan.feature_splits) : 1;
  plan.backward_flops = (kept > 0 ? 4 : 4 + 2 * makers) * N * C * D;
  // The weights are read for the cosines, the projection and the features' gradient: once from HBM
  // if the chunk stays in the cache.
  const bool cached = cached_bytes(p) * plan.chunk <= cache_of(gpu);
  const double reads = cached ? 1 : kept > 0 ? 2 : 3;
  plan.backward_hbm =
      C * D * (reads * w + w) + N * D * (x + x) + N * kept * acc + (cached ? 0 : 2 * N * C * x);
  const double class_tiles = tiles(p.C, kClassTile), parts = double(kRowParts);
  const double row_terms = double(round_up(8 * int64_t(acc) + 8, 16)) / 16 * sector;
  const double cosines =
      kept > 0 ? N * C * acc : class_tiles * N * D * x + tiles(p.N, kGradientRows) * C * D * w;
  const double gradient = makers * (cosines + class_tiles * parts * N * row_terms) +
                          N * C * x_pair + class_tiles * parts * N * acc * (2 - 1 / chunks);
  const double weight = class_tiles * N * D * x + C * D * (w_pair + w_pair) +
                        (plan.resident ? 0 : tiles(p.D, kFeatureTile) * N * C * x);
  const double input = tiles(p.D, plan.input_tile) * N * C * x +
                       tiles(p.N, plan.input_tile) * C * D * w +
                       input_splits * N * D * acc * (2 * chunks - 1);
  const double slots = double(plan.chunk / kClassTile * kRowParts);
  const double finish =
      input_splits * N * D * acc + N * D * (x + x) + slots * N * sector + 24 * N * sector;
  plan.backward_l2 = 10 * N * sector + gradient + weight + input + finish;
  plan.backward_seconds = seconds(plan.backward_flops, plan.backward_hbm, plan.backward_l2,
                                  double(plan.backward_launches));
}

// The same on Hopper.
void count_hopper(CudaPlan& plan, const Gpu& gpu) {
  const CudaProblem& p = plan.problem;
  const HopperPlan& hopper = plan.hopper;
  const double N = double(p.N), C = double(p.C), D = double(p.D), chunks = double(plan.chunks);
  const double splits = double(hopper.walkers), input_splits = double(plan.input_splits);
  const double x = 2, w = 4, acc = 4, sector = 32;
  const auto tiles = [](int64_t size, int64_t tile) { return double(ceil_div(size, tile)); };
  const auto seconds = [&](double flops, double hbm, double l2, double launches) {
    return seconds_of(plan, gpu, flops, hbm, l2, launches);
  };
  // To arrange rows, every sector of a row is read four times, and in columns' order eight times.
  const double arranged = double(hopper.rows) * double(hopper.columns) * x;
  const double cosines =
      double(hopper.row_blocks) * C * D * w + double(hopper.class_tiles) * arranged;

  plan.forward_launches = 3 + (plan.finish_rows < p.N);
  plan.forward_flops = 2 * N * C * D;
  plan.forward_hbm = C * D * w + N * D * x;
  const double prepare = N * D * (x + w) + 4 * N * D * x + arranged + 10 * N * sector;
  plan.forward_l2 = prepare + cosines + splits * N * (p.with_sum ? 48 : 40) + N * 20 + C * acc;
  plan.forward_seconds =
      seconds(plan.forward_flops, plan.forward_hbm, plan.forward_l2, double(plan.forward_launches));

  // The weights cross HBM once if the chunk stays in the cache; its gradient tile and rounded
  // weights are written and read again.
  const double cached_bytes = 2 * double(plan.chunk) * (N + 3 * D);
  const bool cached = cached_bytes <= double(cache_of(gpu));
  const double columns = tiles(p.D, 256);
  plan.backward_launches = 2 + 3 * plan.chunks;
  plan.backward_flops = 6 * N * C * D;
  plan.backward_hbm =
      C * D * (w + w) + N * D * (x + x) + (cached ? 0 : C * D * x + 2 * C * (N + D) * x);
  const double slots = double(hopper.col_slots), walkers = double(hopper.gradient_walkers);
  const double arrange = 12 * N * D * x + 2 * arranged + 4 * N * sector;
  const double gradient =
      cosines + C * (N + D) * x + chunks * walkers * N * 3 * sector + C * acc * (4 * slots);
  const double weight =
      columns * N * C * x + tiles(p.C, 128) * N * D * x + C * D * (x + w) + C * acc * (2 + slots);
  const double features = columns * N * C * x + tiles(p.N, 128) * C * D * x +
                          input_splits * N * D * acc * (2 * chunks - 1);
  const double finish =
      input_splits * N * D * acc + N * D * (x + x) + N * D / 2 + walkers * N * 2 * chunks * acc;
  plan.backward_l2 = arrange + gradient + weight + features + finish;
  plan.backward_seconds = seconds(plan.backward_flops, plan.backward_hbm, plan.backward_l2,
                                  double(plan.backward_launches));
}

}  // namespace

const Gpu* find_gpu(const std::string& name) {
  for (const Gpu& gpu : kGpus)
    if (name == gpu.name) return &gpu;
  return nullptr;
}

std::string gpu_names() {
  std::string names;
  for (const Gpu& gpu : kGpus) names += (names.empty() ? "" : ", ") + std::string(gpu.name);
  return names;
}

ForwardWorkspace::ForwardWorkspace(const CudaPlan& plan) {
  const int64_t N = plan.problem.N, acc = accumulator_size(plan), runs = plan.class_splits * N;
  const HopperPlan& hopper = plan.hopper;
  Cursor cursor;
  label = cursor.take(N * 8);
  target_score = cursor.take(N * acc);
  target = cursor.take(N * acc);
  max = cursor.take(runs * acc);
  sum_exp = cursor.take(runs * acc);
  sum = cursor.take(plan.problem.with_sum ? runs * acc : 0);
  rank = cursor.take(runs * 4);
  totals = cursor.take(ceil_div(N, plan.finish_rows) * 2 * 8);
  arranged = cursor.take(hopper.used ? hopper.rows * hopper.columns * size_of(plan.problem.x) : 0);
  size = cursor.at;
}

double flop_rate(const CudaPlan& plan, const Gpu& gpu) {
  return plan.hopper.used ? gpu.wgmma_flop_rate : gpu.flop_rate[int(plan.math)];
}
double l2_rate(const CudaPlan& plan, const Gpu& gpu) {
  return plan.hopper.used ? gpu.wgmma_l2_rate : gpu.l2_rate;
}

int64_t dot_slots(const CudaPlan& plan) {
  return plan.hopper.used ? plan.hopper.dot_slots : plan.chunk / kClassTile * kRowParts;
}
int64_t total_count(const CudaPlan& plan) {
  return plan.hopper.used ? plan.hopper.totals : plan.chunk / kClassTile * plan.row_groups;
}

BackwardWorkspace::BackwardWorkspace(const CudaPlan& plan) {
  const CudaProblem& p = plan.problem;
  const int64_t acc = accumulator_size(plan);
  const int64_t slots = plan.latency ? plan.feature_splits : plan.row_groups;
  const HopperPlan& hopper = plan.hopper;
  Cursor cursor;
  rows = cursor.take(p.N * round_up(8 * acc + 8, 16));
  gain = cursor.take(2 * acc);
  grad = cursor.take((hopper.used ? hopper.grad_stride : p.N) * plan.chunk * size_of(p.x));
  row_dot = cursor.take(dot_slots(plan) * p.N * acc);
  col_sums = cursor.take((hopper.used ? hopper.col_slots : slots) * 3 * plan.chunk * acc);
  dx = cursor.take(plan.input_splits * p.N * p.D * acc);
  totals = cursor.take(total_count(plan) * 2 * 8);
  if (hopper.used) {
    arranged = cursor.take(hopper.rows * hopper.columns * size_of(p.x));
    arranged_columns = cursor.take(p.N * hopper.columns * size_of(p.x));
    weight = cursor.take(plan.chunk * hopper.weight_stride * size_of(p.x));
  }
  size = cursor.at;
}

namespace {

// Tiles as csrc/mainloop_sm90.cuh has them.
void plan_hopper(CudaPlan& plan, const Gpu& gpu) {
  const CudaProblem& p = plan.problem;
  HopperPlan& hopper = plan.hopper;
  hopper.used = true;
  hopper.blocks = gpu.sms;
  hopper.rows = round_up(p.N, 32);
  hopper.columns = round_up(p.D, kHopperDepth);
  hopper.grad_stride = round_up(p.N, 8);
  hopper.weight_stride = round_up(p.D, 8);

  // Small tiles where large ones would leave multiprocessors without any.
  hopper.row_blocks = ceil_div(p.N, kHopperRows);
  hopper.few = hopper.row_blocks * ceil_div(p.C, 128) < gpu.sms;
  const int64_t classes = hopper.few ? 64 : 128;
  hopper.class_tiles = ceil_div(p.C, classes);
  const int64_t most = std::max<int64_t>(gpu.sms / hopper.row_blocks, 1);
  hopper.walkers = std::min(hopper.class_tiles, most);
  plan.class_splits = hopper.walkers;

  const int64_t products = ceil_div(p.N, kHopperProductRows) * ceil_div(p.D, kHopperProductCols);
  const int64_t partial = std::max<int64_t>(p.N * p.D * 4, 1);  // bytes of a features' gradient
  const int64_t most_input =
      std::clamp<int64_t>(std::min(gpu.sms / products, 16 * kMiB / partial), 1, 65535);

  // Chunks: gradient tile and rounded weights in 44 MiB, less where what does not depend on classes
  // would take the workspace over its budget and no more than the L2 cache holds, in whole waves.
  hopper.col_slots = hopper.row_blocks * (hopper.few ? 2 : 1);
  const int64_t rest = most_input * partial + 4 * hopper.rows * hopper.columns +
                       p.N * (48 + 4 * most) + hopper.row_blocks * most * 128 + kMiB;
  const int64_t cached = gpu.l2 * 9 / 10;
  const int64_t room =
      std::clamp(std::min(kBudget - rest, cached), std::min(16 * kMiB, cached), 44 * kMiB);
  const int64_t bytes = 2 * (hopper.grad_stride + hopper.weight_stride);
  const int64_t tiles = std::clamp<int64_t>(room / (bytes * classes), 1, hopper.class_tiles);
  const bool all = tiles == hopper.class_tiles;
  plan.chunk = (tiles > most && !all ? tiles / most * most : tiles) * classes;
  plan.chunks = ceil_div(p.C, plan.chunk);
  hopper.gradient_walkers = std::min(plan.chunk / classes, most);
  hopper.dot_slots = hopper.gradient_walkers;
  hopper.totals = hopper.row_blocks * hopper.gradient_walkers * 8;

  const int64_t steps = ceil_div(plan.chunk, kHopperDepth);
  plan.input_splits = std::clamp<int64_t>(steps / 2, 1, most_input);
  plan.latency = false;
  plan.resident = false;
  plan.row_groups = hopper.row_blocks;
}

// Few launches, or many chunks.
CudaPlan plan_path(const CudaProblem& p, bool latency, const Gpu& gpu) {
  CudaPlan plan{};
  plan.problem = p;
  plan.math = math_of(p.x, p.allow_tf32);
  const int64_t acc = accumulator_size(plan), step = kStepBytes / size_of(p.x);
  const bool tensor_cores = plan.math != Math::kF32 && plan.math != Math::kF64;
  const auto tiles_of = [](int64_t rows, int64_t cols, int64_t tile) {
    return ceil_div(rows, tile) * ceil_div(cols, tile);
  };

  // Large tiles load half the bytes: where there are enough of them for nearly every SM.
  const bool large = tensor_cores && tiles_of(p.N, p.C, kLargeTile) * 4 >= gpu.sms * 3;
  plan.tile = large ? kLargeTile : kSmallTile;
  plan.row_tiles = ceil_div(p.N, plan.tile);
  const int64_t class_tiles = ceil_div(p.C, plan.tile);
  plan.tiles_per_split = ceil_div(class_tiles, parts(plan.row_tiles, class_tiles, gpu));
  plan.class_splits = ceil_div(class_tiles, plan.tiles_per_split);

  // The gradient tile of all rows stays in shared memory where two blocks still fit on an SM, one
  // waiting while the other multiplies, or where there is but one for each. Without it a latency
  // path needs a block for every SM: blocks that share a weight gradient must have the tile.
  const int64_t all_tiles = ceil_div(p.C, kClassTile);
  const int64_t resident_bytes = round_up(p.N, kGradientRows) * kClassTile * size_of(p.x);
  const int64_t block_bytes = gradient_shared_bytes(plan.math) + resident_bytes;
  const bool fits = block_bytes <= gpu.shared_per_block &&
                    (all_tiles <= gpu.sms || 2 * (block_bytes + 1024) <= gpu.shared_per_sm);
  plan.latency = latency && (fits || (p.N <= 1024 && all_tiles >= gpu.sms));
  plan.resident = plan.latency && fits;
  plan.chunk = plan.latency ? round_up(p.C, kClassTile) : chunk_of(p, acc, gpu);
  plan.chunks = ceil_div(p.C, plan.chunk);
  const int64_t chunk_tiles = plan.chunk / kClassTile;
  const int64_t feature_tiles = ceil_div(p.D, kFeatureTile);
  // Each of them makes it: worth it where the products need only be loaded.
  const bool shared = !plan.latency || (plan.resident && p.kept > 0);
  plan.feature_splits = parts(chunk_tiles, shared ? feature_tiles : 1, gpu);
  plan.row_groups = plan.latency ? 1 : parts(chunk_tiles, ceil_div(p.N, kGradientRows), gpu);

  const int64_t steps = ceil_div(plan.chunk, step);
  const int64_t most_input = std::clamp<int64_t>(
      std::min(steps / 4, 16 * kMiB / std::max<int64_t>(p.N * p.D * acc, 1)), 1, 65535);
  const int64_t large_tiles = tiles_of(p.N, p.D, kLargeTile);
  plan.input_tile = tensor_cores && large_tiles * most_input >= gpu.sms ? kLargeTile : kSmallTile;
  plan.input_splits = parts(tiles_of(p.N, p.D, plan.input_tile), most_input, gpu);

  if (gpu.wgmma && p.bulk && size_of(p.x) == 2 && p.weight == DType::kFloat32 &&
      p.C < (int64_t(1) << 31) - 1024)
    plan_hopper(plan, gpu);
  // One block merges 8192 partial results in the time that one more launch costs.
  plan.finish_rows = p.N * plan.class_splits <= 8192 ? p.N : 16;
  plan.saved = SavedLayout(p.N, p.C, p.kept).size * acc;
  plan.forward_workspace = ForwardWorkspace(plan).size;
  plan.backward_workspace = BackwardWorkspace(plan).size;
  if (plan.hopper.used)
    count_hopper(plan, gpu);
  else
    count(plan, gpu);
  return plan;
}

}  // namespace

CudaPlan plan_cuda(const CudaProblem& problem, const Gpu& gpu) {
  const CudaPlan few = plan_path(problem, problem.N * problem.C * 4 <= kBudget, gpu);
  if (few.hopper.used) return few;
  return few.backward_workspace <= kBudget ? few : plan_path(problem, false, gpu);
}

}  // namespace tvmf
