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

template <class T>
struct ForwardPass {
  const ForwardCall& call;
  WorkspaceBase workspace;
  Saved<T> saved;
  RowTargets<T> targets;
  PartialStatistics<T> partial;
  double* totals;

  ForwardPass(const ForwardCall& call, const CudaProblem& problem, const ForwardWorkspace& at,
              int64_t kept, int64_t splits)
      : call(call),
        workspace{static_cast<unsigned char*>(call.workspace)},
        saved(Saved<T>::of(static_cast<T*>(call.saved), problem.N, problem.C, kept)),
        targets{.label = workspace.at<int64_t>(at.label),
                .score = workspace.at<T>(at.target_score)},
        partial{.max = workspace.at<T>(at.max),
                .sum_exp = workspace.at<T>(at.sum_exp),
                .sum = workspace.at<T>(at.sum),
                .rank = workspace.at<int>(at.rank),
                .count = splits,
                .with_sum = problem.with_sum},
        totals(workspace.at<double>(at.totals)) {}

  cudaError_t prepare(Math math, const ArrangedRows& arranged) const {
    return launch_prepare<T>(
        {.head = call.head, .saved = saved, .targets = targets, .arranged = arranged}, math,
        call.stream);
  }
  cudaError_t finish() const {
    return launch_finish<T>({.head = call.head,
                             .options = call.options,
                             .out = call.out,
                             .saved = saved,
                             .targets = targets,
                             .partial = partial,
                             .block_rows = finish_block_rows(call.head.N, partial.count),
                             .totals = totals},
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

  BackwardPass(const BackwardCall& call, const CudaProblem& problem, const BackwardWorkspace& at,
               int64_t column_sums, int64_t kept, const PartialCounts& counts)
      : call(call),
        workspace{static_cast<unsigned char*>(call.workspace)},
        counts(counts),
        saved(Saved<const T>::of(static_cast<const T*>(call.saved), problem.N, problem.C, kept)),
        rows{.rows = workspace.at<GradientRow<T>>(at.rows),
             .targets = workspace.at<TargetGradient<T>>(at.targets),
             .loss_scale = workspace.at<T>(at.loss_scale),
             .scale_rest = workspace.at<double>(at.scale_rest)},
        sums{.row_dot = workspace.at<T>(at.row_dot),
             .columns = workspace.at<T>(column_sums),
             .totals = workspace.at<double>(at.totals)},
        dx{.data = workspace.at<T>(at.dx), .count = counts.features},
        with_sum(problem.with_sum),
        float16(problem.x == DType::kFloat16) {}

  cudaError_t prepare(const ArrangedRows& arranged, const UnitRows& unit_x) const {
    return launch_prepare_gradient<T>({.head = call.head,
                                       .options = call.options,
                                       .upstream = call.upstream,
                                       .saved = saved,
                                       .gradient = rows,
                                       .arranged = arranged,
                                       .unit_x = unit_x,
                                       .with_sum = with_sum,
                                       .float16 = float16},
                                      call.stream);
  }
  cudaError_t finish() const {
    return launch_finish_gradient<T>({.head = call.head,
                                      .out = call.out,
                                      .saved = saved,
                                      .inv_loss_scale = rows.loss_scale + 1,
                                      .scale_rest = rows.scale_rest,
                                      .sums = sums,
                                      .row_dots = counts.row_dots,
                                      .totals = counts.totals,
                                      .dx = {.data = dx.data, .count = dx.count},
                                      .float16 = float16},
                                     call.stream);
  }
};

}  // namespace tvmf::rows
