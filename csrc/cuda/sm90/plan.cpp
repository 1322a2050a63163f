#include "cuda/sm90/plan.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "cuda/rows/cost.h"

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

// The rows of which products are kept are few enough for their terms to lie in the 48 KiB of shared
// memory that every block can have, beside the sums of a tile's classes.
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
  if (p.kept * p.N * 4 >= KeptLayout(p).bytes && p.kept > 0 && p.N <= most_rows && keeps(p, gpu))
    return kept_plan(p, p.kept, gpu);
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
