// The part of a pass that all architectures share: views of its workspace, and its first and last
// launches. An architecture adds the launches between them.
#pragma once

#include "cuda/rows/rows.cuh"

namespace tvmf::rows {

struct WorkspaceBase {
  unsigned char* base;

  void* bytes(int64_t offset) const { return base + offset; }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base + offset);
  }
};

inline void skip_rows(VectorRef& vector, int64_t rows) {
  if (vector.data)
    vector.data =
        static_cast<const char*>(vector.data) + rows * vector.stride * size_of(vector.dtype);
}
inline CudaHead rows_of(CudaHead head, int64_t begin, int64_t count) {
  head.N = count;
  head.x.data =
      static_cast<const char*>(head.x.data) + begin * head.x.row_stride * size_of(head.x.dtype);
  head.target += begin * head.target_stride;
  skip_rows(head.target_score, begin);
  return head;
}

// The call for `count` of its rows, from `begin` on.
inline ForwardCall rows_of(ForwardCall call, int64_t begin, int64_t count, int64_t size) {
  call.head = rows_of(call.head, begin, count);
  for (void** out : {&call.out.others, &call.out.cosine, &call.out.sum})
    if (*out) *out = static_cast<char*>(*out) + begin * size;
  if (call.out.rank) call.out.rank += begin;
  if (call.out.loss && call.options.reduction == Reduction::kNone)
    call.out.loss = static_cast<char*>(call.out.loss) + begin * size;
  return call;
}
inline BackwardCall rows_of(BackwardCall call, int64_t begin, int64_t count) {
  call.head = rows_of(call.head, begin, count);
  for (VectorRef* each :
       {&call.upstream.loss, &call.upstream.others, &call.upstream.cosine, &call.upstream.sum})
    skip_rows(*each, begin);
  if (call.out.x.data)
    call.out.x.data =
        static_cast<char*>(call.out.x.data) + begin * call.head.D * size_of(call.out.x.dtype);
  return call;
}

template <class T>
struct ForwardPass {
  const ForwardCall& call;
  WorkspaceBase workspace;
  Saved<T> saved;
  RowTargets<T> targets;
  PartialStatistics<T> partial;
  double* totals;
  unsigned* finished;

  // `call` has the rows from `begin` on, where it does not have all rows of the problem.
  ForwardPass(const ForwardCall& call, const CudaProblem& problem, const ForwardWorkspace& at,
              int64_t kept, int64_t splits, int64_t begin = 0)
      : call(call),
        workspace{static_cast<unsigned char*>(call.workspace)},
        saved(
            Saved<T>::of(static_cast<T*>(call.saved), problem.N, problem.C, kept).from_row(begin)),
        targets{.label = workspace.at<int64_t>(at.label),
                .score = workspace.at<T>(at.target_score)},
        partial{.max = workspace.at<T>(at.max),
                .sum_exp = workspace.at<T>(at.sum_exp),
                .sum = workspace.at<T>(at.sum),
                .rank = workspace.at<int>(at.rank),
                .count = splits,
                .with_sum = problem.with_sum},
        totals(workspace.at<double>(at.totals)),
        finished(workspace.at<unsigned>(at.finished)) {}

  cudaError_t prepare(Math math, const ArrangedRows& arranged) const {
    return launch_prepare<T>({.head = call.head,
                              .saved = saved,
                              .targets = targets,
                              .arranged = arranged,
                              .finished = finished},
                             math, call.stream);
  }
  int64_t blocks_to_finish() const {
    return ceil_div(call.head.N, finish_block_rows(call.head.N, partial.count));
  }
  cudaError_t finish() const { return finish(0, blocks_to_finish()); }
  cudaError_t finish(int64_t first_block, int64_t all_blocks) const {
    return launch_finish<T>({.head = call.head,
                             .options = call.options,
                             .out = call.out,
                             .saved = saved,
                             .targets = targets,
                             .partial = partial,
                             .block_rows = finish_block_rows(call.head.N, partial.count),
                             .first_block = first_block,
                             .all_blocks = all_blocks,
                             .totals = totals,
                             .finished = finished},
                            call.stream);
  }
};

template <class T>
struct BackwardPass {
  const BackwardCall& call;
  WorkspaceBase workspace;
  PartialCounts counts;
  Saved<const T> saved;
  GradientRows<T> rows;
  GradientSums<T> sums;
  PartialFeatures<T> dx;
  bool with_sum;
  bool float16;
  bool unit_rows;  // whether the products of the gradients have unit rows of the features
  int64_t earlier_totals = 0;  // slots of the totals of earlier segments

  BackwardPass(const BackwardCall& call, const CudaProblem& problem, const BackwardWorkspace& at,
               int64_t column_sums, int64_t kept, const PartialCounts& counts, int64_t begin = 0)
      : call(call),
        workspace{static_cast<unsigned char*>(call.workspace)},
        counts(counts),
        saved(Saved<const T>::of(static_cast<const T*>(call.saved), problem.N, problem.C, kept)
                  .from_row(begin)),
        rows{.rows = workspace.at<GradientRow<T>>(at.rows),
             .targets = workspace.at<TargetGradient<T>>(at.targets),
             .loss_scale = workspace.at<T>(at.loss_scale),
             .scale_rest = workspace.at<double>(at.scale_rest)},
        sums{.row_dot = workspace.at<T>(at.row_dot),
             .columns = workspace.at<T>(column_sums),
             .totals = workspace.at<double>(at.totals)},
        dx{.data = workspace.at<T>(at.dx), .count = counts.features},
        with_sum(problem.with_sum),
        float16(problem.x == DType::kFloat16),
        unit_rows(float16) {}

  cudaError_t prepare(const ArrangedRows& arranged, const UnitRows& unit_x) const {
    return prepare(arranged, unit_x, {.begin = 0, .all = call.head.N});
  }
  cudaError_t prepare(const ArrangedRows& arranged, const UnitRows& unit_x,
                      const RowSegment& segment) const {
    return launch_prepare_gradient<T>(prepare_params(arranged, unit_x, segment), call.stream);
  }
  PrepareGradientParams<T> prepare_params(const ArrangedRows& arranged, const UnitRows& unit_x,
                                          const RowSegment& segment) const {
    return {.head = call.head,
            .options = call.options,
            .upstream = call.upstream,
            .saved = saved,
            .gradient = rows,
            .arranged = arranged,
            .unit_x = unit_x,
            .segment = segment,
            .with_sum = with_sum,
            .float16 = float16};
  }
  // The totals of a segment follow those of the segments before, `slots` in all.
  void add_totals_after(int64_t slots) {
    earlier_totals = slots;
    sums.totals += 2 * slots;
  }
  // The gradients of scalars are made of the totals of all segments, by the last one.
  cudaError_t finish(bool scalars = true) const {
    CudaGradients out = call.out;
    if (!scalars) out.scale.data = nullptr;
    if (!scalars && call.head.kappa.stride == 0) out.kappa.data = nullptr;
    GradientSums<T> all_sums = sums;
    all_sums.totals -= 2 * earlier_totals;
    return launch_finish_gradient<T>({.head = call.head,
                                      .out = out,
                                      .saved = saved,
                                      .inv_loss_scale = rows.loss_scale + 1,
                                      .scale_rest = rows.scale_rest,
                                      .sums = all_sums,
                                      .row_dots = counts.row_dots,
                                      .totals = earlier_totals + counts.totals,
                                      .dx = {.data = dx.data, .count = dx.count},
                                      .unit_rows = unit_rows},
                                     call.stream);
  }
};

}  // namespace tvmf::rows
