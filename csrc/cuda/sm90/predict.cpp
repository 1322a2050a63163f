// What the launches of a plan cost by count, and the times that follow from it.
#include <algorithm>
#include <cmath>
#include <string_view>

#include "cuda/rows/cost.h"
#include "cuda/sm90/plan.h"

namespace tvmf::sm90 {
namespace {

double tiles(int64_t size, int64_t tile) { return double(ceil_div(size, tile)); }

// Bytes that the arranged features take.
double arranged_bytes(const Plan& plan) {
  return double(plan.arranged_rows) * double(plan.arranged_columns) * 2;
}

// Bytes that the tiles of cosines load.
double cosine_bytes(const CudaProblem& p, const Plan& plan) {
  return double(plan.row_blocks) * double(p.C) * double(p.D) * double(size_of(p.given_weight)) +
         double(plan.class_tiles) * arranged_bytes(plan);
}

// Whether what a chunk's products read stays in the cache: its weights cross the memory interface
// once then, and its gradient tile and rounded weights never. Otherwise these are written and read
// again.
bool cached(const CudaProblem& p, const Plan& plan, const Gpu& gpu) {
  return 2 * double(plan.chunk) * double(p.N + 3 * p.D) <= double(gpu.l2 * 7 / 10);
}

// Instructions that a multiprocessor issues a cycle in an epilogue, where four are the most that it
// can: only two warps share each of its schedulers.
constexpr double kIssued = 1.8;

// Bytes that a block of kept_gradient reads to make the terms of a row: its label, once more for
// the weight of all rows, its norm and four statistics.
constexpr double kKeptRowBytes = 36;

// Prediction of a kernel whose persistent blocks make products in tiles: what the multiprocessor
// with the most tiles does. A tile that is stored ends in waits of its own, since a block's next
// products start when its stores have been issued.
struct TileTimes {
  double tiles;     // tiles of that multiprocessor, over all launches
  double product;   // seconds of the products of a tile
  double epilogue;  // seconds of the elementwise work and the stores of a tile
  bool stored;
};
KernelCost tile_kernel(KernelCost kernel, const TileTimes& times, const Gpu& gpu) {
  const double launches = double(kernel.launches), wait = gpu.wait_seconds;
  const double between = times.epilogue + times.stored * KernelCost::kTile * wait;
  kernel.products = times.tiles * times.product;
  kernel.between = (times.tiles - launches) * between;
  kernel.alone = launches * (KernelCost::kStart * wait + times.epilogue + KernelCost::kTile * wait);
  return kernel;
}

// The times of a tile of cosines. An instruction of a warp serves 32 elements.
TileTimes cosine_times(const CudaProblem& p, const Plan& plan, const Gpu& gpu,
                       double instructions) {
  const double elements = double(kCosineRows) * double(plan.tile_classes());
  const double steps = tiles(p.D, kDepth), rate = gpu.cosine_rate / double(gpu.sms);
  return {.tiles = 0,
          .product = steps * 2 * elements * kDepth / rate,
          .epilogue = elements / 32 * instructions / (kIssued * gpu.clock),
          .stored = false};
}

// The most tiles of cosines on a multiprocessor, where `blocks` blocks share the class tiles of
// each block of rows. A multiprocessor has several blocks of rows only where these are more than
// the multiprocessors.
double most_tiles(const Plan& plan, int64_t class_tiles, int64_t blocks) {
  return double(ceil_div(class_tiles, blocks) * ceil_div(plan.row_blocks * blocks, plan.blocks));
}

// Seconds of a step of the products of gradients.
double product_step(const Gpu& gpu) {
  return 2.0 * kProductRows * kProductCols * kDepth / (gpu.product_rate / double(gpu.sms));
}

// The sum of f(classes of a chunk) over the chunks, all of which but the last are alike.
template <class F>
double over_chunks(const CudaProblem& p, const Plan& plan, const F& f) {
  return double(plan.chunks - 1) * double(f(plan.chunk)) +
         double(f(p.C - (plan.chunks - 1) * plan.chunk));
}

PassCost forward_cost(const CudaProblem& p, const Plan& plan, const Gpu& gpu, double instructions,
                      bool last_segment) {
  const double N = double(p.N), C = double(p.C), D = double(p.D), x = 2, acc = 4;
  const double w = double(size_of(p.given_weight)), splits = double(plan.statistics_blocks);
  // Where float32 weights are rounded to float16, prepare_rows reads them first: those of a class
  // twice, and those of a target four times more.
  const double first = !plan.narrow_weight && p.x == DType::kFloat16 ? 1 : 0;
  // To arrange the features, every sector of a row is read four times, or once in order.
  const double prepare_bytes = N * D * (x + w) + (plan.narrow_weight ? 1 : 4) * N * D * x +
                               arranged_bytes(plan) + 10 * N * kSectorBytes +
                               first * (2 * C + 4 * N) * D * w;
  KernelCost prepare = rows::prepare_cost(p, arranged_bytes(plan) / 16, prepare_bytes, gpu);
  prepare.hbm = first * C * D * w + N * D * x;

  TileTimes times = cosine_times(p, plan, gpu, instructions);
  times.tiles = most_tiles(plan, plan.class_tiles, plan.statistics_blocks);
  times.stored = plan.keeps();
  const double kept = plan.keeps() ? double(KeptLayout(p).bytes) : 0;
  const KernelCost statistics{
      .name = "statistics",
      .launches = 1,
      .flops = 2 * N * C * D,
      .hbm = C * D * w + (cached(p, plan, gpu) ? 0 : kept),
      .l2 = cosine_bytes(p, plan) + splits * N * (p.with_sum ? 28 : 24) + C * acc + kept};
  PassCost pass;
  pass.kernels = {prepare, tile_kernel(statistics, times, gpu)};
  const double merge_bytes = splits * N * (p.with_sum ? 20 : 16) + N * 20;
  if (plan.merges_rows) {
    pass.kernels.back().l2 += merge_bytes;
    pass.kernels.back().alone += (rows::kArriveWaits + rows::kFinishWaits) * gpu.wait_seconds;
  } else {
    pass.kernels.push_back(rows::finish_cost(p, plan.statistics_blocks, merge_bytes, last_segment,
                                             plan.segments > 1, gpu));
  }
  return pass;
}

// The two products of all chunks. Beside what follows from the tiles of the gradient and the
// rounded weights, which cross the memory interface where they do not stay in the cache, dw is
// written there.
KernelCost products_cost(const CudaProblem& p, const Plan& plan, const Gpu& gpu,
                         double uncached_bytes) {
  const double N = double(p.N), C = double(p.C), D = double(p.D), x = 2, acc = 4;
  const double dw = plan.adds_gradients() ? acc : double(size_of(p.given_weight));
  const double columns = tiles(p.D, kProductCols), wait = gpu.wait_seconds;
  const double partial = N * D * acc, written = C * D * dw;
  KernelCost kernel{.name = "products",
                    .launches = plan.chunks,
                    .flops = 4 * N * C * D,
                    .hbm = written + 2 * uncached_bytes,
                    .l2 = 2 * columns * N * C * x + tiles(p.C, kProductRows) * N * D * x +
                          tiles(p.N, kProductRows) * C * D * x + C * D * x + written +
                          C * acc * double(2 + plan.column_slots)};
  // A part of a tile of dx is added to that of the chunk before, which lies in the L2 cache.
  double partial_bytes = double(plan.partial_features) * partial;
  const auto add_chunks = [&](double count, int64_t classes, bool first) {
    const ProductSchedule schedule = plan.schedule_of(p.N, p.D, classes);
    const ScheduleLoad load = load_of(schedule);
    kernel.products += count * double(load.steps) * product_step(gpu);
    kernel.between += count * double(load.tiles - 1) * KernelCost::kTile * wait;
    partial_bytes +=
        (count - first) * 2 * double(load.parts) * partial / double(schedule.features.count());
  };
  const int64_t last = p.C - (plan.chunks - 1) * plan.chunk;
  if (plan.chunks > 1) add_chunks(double(plan.chunks - 1), plan.chunk, true);
  add_chunks(1, last, plan.chunks == 1);
  kernel.l2 += partial_bytes;
  // Half of the blocks write dw while the others multiply.
  kernel.between += written / gpu.hbm_rate / 2 + partial_bytes / gpu.l2_rate;
  kernel.alone = double(plan.chunks * (KernelCost::kStart + KernelCost::kTile)) * wait;
  return kernel;
}

// kept_gradient: each block makes the terms of all rows, which is a chain of waits, and then its
// tiles, elementwise.
KernelCost kept_gradient_cost(const CudaProblem& p, const Plan& plan, const Gpu& gpu,
                              double instructions, double tile_bytes) {
  const double N = double(p.N), C = double(p.C), D = double(p.D), x = 2, acc = 4;
  const double stride = double(KeptLayout(p).stride), blocks = double(plan.kept_tiles.blocks);
  const double tiles = std::ceil(double(plan.kept_tiles.tiles) / blocks);
  const double elements = double(round_up(p.N, 32)) * double(plan.kept_tiles.classes());
  // To arrange the features by columns, every sector of a row is read eight times.
  const double arrange = 8 * N * D * x + N * double(plan.arranged_columns) * x;
  const double kept = C * stride * acc;
  KernelCost kernel{.name = "kept_gradient",
                    .launches = 1,
                    .hbm = (cached(p, plan, gpu) ? 0 : kept) + tile_bytes + N * D * x,
                    .l2 = kept + C * double(plan.gradient_stride) * x + arrange +
                          blocks * N * kKeptRowBytes + C * acc * 2};
  kernel.between = tiles * elements / 32 * instructions / (kIssued * gpu.clock);
  const double rounds = std::ceil(N / kKeptThreads);
  kernel.alone = (rows::kPrepareGradientWaits * rounds + KernelCost::kTile) * gpu.wait_seconds;
  return kernel;
}

PassCost backward_cost(const CudaProblem& p, const Plan& plan, const Gpu& gpu,
                       const EpilogueInstructions& instructions) {
  const double N = double(p.N), C = double(p.C), D = double(p.D), x = 2, acc = 4;
  const double w = double(size_of(p.given_weight)), chunks = double(plan.chunks);
  const double slots = double(plan.column_slots), blocks = double(plan.gradient_blocks);
  const double sums = double(plan.partial_features) * N * D * acc;
  const bool in_cache = cached(p, plan, gpu);
  const double tile_bytes = in_cache ? 0 : C * N * x, rounded_bytes = in_cache ? 0 : C * D * x;

  KernelCost finish = rows::finish_gradient_cost(p, sums + N * D * (x + x) + N * D / 2, gpu);
  finish.hbm = N * D * x;
  const KernelCost products = products_cost(p, plan, gpu, tile_bytes + rounded_bytes);
  if (plan.keeps()) {
    PassCost pass;
    pass.kernels = {kept_gradient_cost(p, plan, gpu, instructions.kept_gradient, tile_bytes),
                    products, finish};
    return pass;
  }

  TileTimes times = cosine_times(p, plan, gpu, instructions.gradient);
  times.stored = true;
  times.tiles = over_chunks(p, plan, [&](int64_t classes) {
    return most_tiles(plan, ceil_div(classes, plan.tile_classes()), plan.gradient_blocks);
  });
  const KernelCost gradient{.name = "gradient",
                            .launches = plan.chunks,
                            .flops = 2 * N * C * D,
                            .hbm = C * D * w + tile_bytes + rounded_bytes,
                            .l2 = cosine_bytes(p, plan) + C * (N + D) * x +
                                  chunks * blocks * N * 3 * kSectorBytes + C * acc * (4 * slots)};

  // To arrange the features in both orders, every sector of a row is read twelve times, or nine.
  const double arrange =
      (plan.narrow_weight ? 9 : 12) * N * D * x + 2 * arranged_bytes(plan) + 4 * N * kSectorBytes;
  KernelCost prepare = rows::prepare_gradient_cost(p, arrange, gpu);
  prepare.hbm = N * D * x;
  PassCost pass;
  pass.kernels = {prepare, tile_kernel(gradient, times, gpu), products, finish};
  return pass;
}

// Adds the costs of `times` segments of rows that are alike.
void add(PassCost& to, const PassCost& cost, double times) {
  for (const KernelCost& kernel : cost.kernels) {
    const auto same = [&](const KernelCost& other) {
      return std::string_view(other.name) == kernel.name;
    };
    auto found = std::find_if(to.kernels.begin(), to.kernels.end(), same);
    if (found == to.kernels.end()) {
      to.kernels.push_back({.name = kernel.name});
      found = to.kernels.end() - 1;
    }
    found->launches += int64_t(times) * kernel.launches;
    for (double KernelCost::* part :
         {&KernelCost::flops, &KernelCost::hbm, &KernelCost::l2, &KernelCost::products,
          &KernelCost::between, &KernelCost::alone})
      *found.*part += times * (kernel.*part);
  }
}

// Every segment but the first reads the weight's gradient before it writes it.
void add_old_gradients(PassCost& pass, const CudaProblem& p, const Plan& plan, const Gpu& gpu) {
  const double bytes = double(plan.segments - 1) * double(p.C) * double(p.D) * 4;
  for (KernelCost& kernel : pass.kernels) {
    if (std::string_view(kernel.name) != "products") continue;
    kernel.hbm += bytes;
    kernel.l2 += bytes;
    kernel.between += bytes / gpu.hbm_rate / 2;
  }
}

}  // namespace

Cost cost_of(const CudaProblem& problem, const Plan& plan, const Gpu& gpu,
             const EpilogueInstructions& instructions) {
  Cost cost;
  const auto add_segments = [&](int64_t rows, int64_t count, bool last) {
    if (count == 0) return;
    const CudaProblem part = first_rows(problem, rows);
    const Plan of_part = plan.of_rows(rows);
    add(cost.forward, forward_cost(part, of_part, gpu, instructions.statistics, last),
        double(count));
    add(cost.backward, backward_cost(part, of_part, gpu, instructions), double(count));
  };
  add_segments(plan.segment_rows, plan.segments - 1, false);
  add_segments(plan.rows_of(plan.segments - 1, problem.N), 1, true);
  if (plan.segments > 1) add_old_gradients(cost.backward, problem, plan, gpu);
  predict(cost.forward, gpu);
  predict(cost.backward, gpu);
  return cost;
}

}  // namespace tvmf::sm90
