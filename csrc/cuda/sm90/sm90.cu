#include <algorithm>

#include "cuda/rows/passes.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/sm90.h"

namespace tvmf::sm90 {
namespace {

// Makes tensor maps of matrices. `error` is the error of the first one that could not be made.
class MapMaker {
 public:
  explicit MapMaker(DType x) : x_(x) {}

  // 16-bit elements, in boxes of box_rows lines.
  TensorMap of(const void* data, int64_t rows, int64_t cols, int64_t stride, int box_rows) {
    return make(data, x_, rows, cols, stride, box_rows, kAtom);
  }
  TensorMap of_weight(const CudaHead& head, int box_rows) {
    const DType dtype = head.weight.dtype;
    return make(head.weight.data, dtype, head.C, head.D, head.weight.row_stride, box_rows,
                int(kAtom * 2 / size_of(dtype)));
  }
  // Both operands of a kernel of cosines.
  TensorMaps of_cosines(const CudaHead& head, const rows::ArrangedRows& x, const Plan& plan) {
    const int classes = int(plan.tile_classes());
    return {of_weight(head, classes), of(x.by_rows, x.rows, x.columns, x.columns, kCosineRows)};
  }

  cudaError_t error = cudaSuccess;

 private:
  TensorMap make(const void* data, DType dtype, int64_t rows, int64_t cols, int64_t stride,
                 int box_rows, int box_cols) {
    TensorMap map{};
    if (error == cudaSuccess)
      error = make_tensor_map(&map, data, dtype, rows, cols, stride, box_rows, box_cols);
    return map;
  }
  DType x_;
};

CosineTiles cosine_tiles(const Plan& plan, int64_t classes, int64_t blocks) {
  return {.class_tiles = int(ceil_div(classes, plan.tile_classes())),
          .row_blocks = int(plan.row_blocks),
          .blocks = int(blocks)};
}

bool given(const VectorRef& vector) { return vector.data || vector.value != 0; }

// `all`: whether sums or ranks, or gradients of biases or kappa, are wanted.
Terms terms_of(const CudaHead& head, bool all) {
  if (all || given(head.bias)) return Terms::kAll;
  return given(head.prior) ? Terms::kPrior : Terms::kPlain;
}

// What the forward pass keeps, at its place in Saved::product.
KeptTensors kept_at(float* product, const CudaProblem& problem, const Plan& plan) {
  const KeptLayout at(problem);
  void* weight = reinterpret_cast<unsigned char*>(product) + at.weight;
  if (!plan.keeps()) return {};
  return {.product = product,
          .stride = at.stride,
          .weight = {.data = plan.narrow_weight ? nullptr : static_cast<uint16_t*>(weight),
                     .stride = at.weight_stride,
                     .unit_rows = plan.unit_weights()}};
}

// The weights that the products of gradients read: those that the forward pass has kept, or the
// weight itself, or those that `gradient` stores in the workspace.
RoundedWeights rounded_weights(const rows::BackwardPass<float>& pass, const CudaProblem& problem,
                               const Plan& plan, const BackwardWorkspace& at) {
  if (!plan.keeps())
    return {pass.workspace.at<uint16_t>(at.weight), plan.weight_stride, plan.unit_weights()};
  if (!plan.narrow_weight)
    return kept_at(const_cast<float*>(pass.saved.product), problem, plan).weight;
  const MatrixRef& weight = pass.call.head.weight;
  return {static_cast<uint16_t*>(const_cast<void*>(weight.data)), weight.row_stride,
          plan.unit_weights()};
}

// The launches of each chunk. Tensor maps are made once, but for those of a last chunk that
// is smaller: the products must not read beyond its classes.
class ChunkLauncher {
 public:
  ChunkLauncher(const rows::BackwardPass<float>& pass, const CudaProblem& problem, const Plan& plan,
                const BackwardWorkspace& at, const rows::ArrangedRows& arranged, bool first_rows)
      : pass_(pass),
        head_(pass.call.head),
        out_(pass.call.out),
        problem_(problem),
        plan_(plan),
        arranged_(arranged),
        first_rows_(first_rows),
        class_outputs_(out_.weight.data || out_.bias.data || out_.kappa.data),
        gradient_{pass.workspace.at<uint16_t>(at.gradient), plan.gradient_stride},
        weight_(rounded_weights(pass, problem, plan, at)) {}

  cudaError_t launch(const Chunk& chunk) {
    cudaError_t error = chunk.count == mapped_ ? cudaSuccess : prepare(chunk.count);
    if (error == cudaSuccess) error = plan_.keeps() ? kept_gradient(chunk) : gradient(chunk);
    if (error == cudaSuccess && (class_outputs_ || out_.x.data)) error = products(chunk);
    return error;
  }

 private:
  // Makes the maps and the schedule of a chunk of `classes` classes, and with the first chunk's the
  // maps of all chunks.
  cudaError_t prepare(int64_t classes) {
    MapMaker maps(problem_.x);
    const int64_t N = head_.N, D = head_.D;
    if (mapped_ == 0) {
      if (!plan_.keeps()) cosine_maps_ = maps.of_cosines(head_, arranged_, plan_);
      if (class_outputs_)
        weight_maps_.b =
            maps.of(arranged_.by_columns, N, arranged_.columns, arranged_.columns, kDepth);
    }
    if (class_outputs_)
      weight_maps_.a = maps.of(gradient_.data, classes, N, gradient_.stride, kProductRows);
    if (out_.x.data)
      feature_maps_ = {maps.of(gradient_.data, classes, N, gradient_.stride, kDepth),
                       maps.of(weight_.data, classes, D, weight_.stride, kDepth)};
    schedule_ = plan_.schedule_of(N, D, classes);
    mapped_ = classes;
    return maps.error;
  }

  Terms terms() const {
    return terms_of(head_, problem_.with_sum || out_.bias.data || out_.kappa.data);
  }

  // Of all classes, whose products were kept.
  cudaError_t kept_gradient(const Chunk& chunk) const {
    rows::ArrangedRows arranged = arranged_;
    if (!class_outputs_) arranged.by_columns = nullptr;
    const KeptGradientParams p{
        .rows = pass_.prepare_params(arranged, {}, {.begin = 0, .all = head_.N}),
        .product = pass_.saved.product,
        .product_stride = KeptLayout(problem_).stride,
        .gradient = gradient_,
        .sums = pass_.sums,
        .column_stride = chunk.size,
        .tiles = plan_.kept_tiles,
        .terms = terms()};
    return launch_kept_gradient(p, plan_.math, pass_.call.stream);
  }

  cudaError_t gradient(const Chunk& chunk) const {
    const GradientParams p{.maps = cosine_maps_,
                           .head = head_,
                           .saved = pass_.saved,
                           .rows = pass_.rows,
                           .chunk = chunk,
                           .gradient = gradient_,
                           .weight = weight_,
                           .sums = pass_.sums,
                           .tiles = cosine_tiles(plan_, chunk.count, plan_.gradient_blocks),
                           .terms = terms()};
    return launch_gradient(p, plan_, pass_.call.stream);
  }

  cudaError_t products(const Chunk& chunk) const {
    PartialFeatures<float> dx = pass_.dx;
    if (!out_.x.data) dx.data = nullptr;
    const ProductsParams p{.weight_maps = weight_maps_,
                           .feature_maps = feature_maps_,
                           .head = head_,
                           .out = out_,
                           .class_outputs = class_outputs_,
                           .saved = pass_.saved,
                           .inv_loss_scale = pass_.rows.loss_scale + 1,
                           .chunk = chunk,
                           .weight = weight_,
                           .sums = {.data = pass_.sums.columns, .slots = int(plan_.column_slots)},
                           .dx = dx,
                           .schedule = schedule_,
                           .add = !first_rows_};
    return launch_products(p, plan_, pass_.call.stream);
  }

  const rows::BackwardPass<float>& pass_;
  const CudaHead& head_;
  const CudaGradients& out_;
  const CudaProblem& problem_;
  const Plan& plan_;
  const rows::ArrangedRows arranged_;
  const bool first_rows_;     // whether no earlier segment has written the gradients of the classes
  const bool class_outputs_;  // whether any gradient of the classes is wanted
  const ClassMajorGradient gradient_;
  const RoundedWeights weight_;
  int64_t mapped_ = 0;  // classes of the chunk that the maps and the schedule are of
  TensorMaps cosine_maps_{}, weight_maps_{}, feature_maps_{};
  ProductSchedule schedule_{};
};

}  // namespace

cudaError_t forward(const ForwardCall& call, const CudaProblem& problem, const Plan& all) {
  const ForwardWorkspace at(problem, all);
  const auto blocks_of = [&](int64_t rows) {
    return ceil_div(rows, rows::finish_block_rows(rows, all.statistics_blocks));
  };
  const int64_t last = all.segments - 1, blocks = blocks_of(all.segment_rows);
  const int64_t all_blocks = last * blocks + blocks_of(all.rows_of(last, problem.N));
  cudaError_t error = cudaSuccess;
  for (int64_t i = 0; i < all.segments && error == cudaSuccess; ++i) {
    const int64_t begin = i * all.segment_rows, rows = all.rows_of(i, problem.N);
    const Plan plan = all.of_rows(rows);
    const ForwardCall part = rows::rows_of(call, begin, rows, sizeof(float));
    const rows::ForwardPass<float> pass(part, problem, at.rows, plan.kept, plan.statistics_blocks,
                                        begin);
    const rows::ArrangedRows arranged{.rows = plan.arranged_rows,
                                      .columns = plan.arranged_columns,
                                      .by_rows = pass.workspace.bytes(at.arranged),
                                      .by_columns = nullptr,
                                      .rnorm = nullptr,
                                      .ordered = plan.narrow_weight};
    error = pass.prepare(plan.math, arranged);
    if (error != cudaSuccess) return error;
    MapMaker maps(problem.x);
    const StatisticsParams p{.maps = maps.of_cosines(part.head, arranged, plan),
                             .head = part.head,
                             .saved = pass.saved,
                             .targets = pass.targets,
                             .partial = pass.partial,
                             .tiles = cosine_tiles(plan, problem.C, plan.statistics_blocks),
                             .merges_rows = plan.merges_rows,
                             .finished = pass.finished,
                             .options = call.options,
                             .out = part.out,
                             .kept = kept_at(pass.saved.product, problem, plan)};
    if (maps.error != cudaSuccess) return maps.error;
    error = launch_statistics(p, plan, terms_of(call.head, call.out.others || problem.with_sum),
                              call.stream);
    if (error == cudaSuccess && !plan.merges_rows) error = pass.finish(i * blocks, all_blocks);
  }
  return error;
}

cudaError_t backward(const BackwardCall& call, const CudaProblem& problem, const Plan& all) {
  const BackwardWorkspace at(problem, all);
  cudaError_t error = cudaSuccess;
  for (int64_t i = 0; i < all.segments && error == cudaSuccess; ++i) {
    const int64_t begin = i * all.segment_rows, rows = all.rows_of(i, problem.N);
    const Plan plan = all.of_rows(rows);
    const BackwardCall part = rows::rows_of(call, begin, rows);
    rows::BackwardPass<float> pass(part, problem, at.rows, at.column_sums, plan.kept,
                                   plan.partial_counts(), begin);
    pass.unit_rows = plan.unit_features();
    const rows::ArrangedRows arranged{.rows = plan.arranged_rows,
                                      .columns = plan.arranged_columns,
                                      .by_rows = pass.workspace.bytes(at.arranged),
                                      .by_columns = pass.workspace.bytes(at.arranged_columns),
                                      .rnorm = pass.unit_rows ? pass.saved.x_rnorm : nullptr,
                                      .ordered = plan.narrow_weight};
    pass.add_totals_after(i * all.partial_counts().totals);
    ChunkLauncher launcher(pass, problem, plan, at, arranged, i == 0);
    if (!plan.keeps()) error = pass.prepare(arranged, {}, {.begin = begin, .all = problem.N});
    for (int64_t first = 0; first < problem.C && error == cudaSuccess; first += plan.chunk)
      error = launcher.launch({first, std::min(plan.chunk, problem.C - first), plan.chunk});
    if (error == cudaSuccess) error = pass.finish(/*scalars=*/i + 1 == all.segments);
  }
  return error;
}

}  // namespace tvmf::sm90
