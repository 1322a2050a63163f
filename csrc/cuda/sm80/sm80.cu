#include <algorithm>

#include "cuda/rows/passes.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/sm80.h"

namespace tvmf::sm80 {
namespace {

template <class T>
cudaError_t forward_of(const ForwardCall& call, const CudaProblem& problem, const Plan& plan) {
  const ForwardWorkspace at(problem, plan);
  const rows::ForwardPass<T> pass(call, problem, at.rows, plan.kept, plan.class_splits);
  cudaError_t error = pass.prepare(plan.math, {});
  if (error == cudaSuccess)
    error = launch_statistics<T>({.head = call.head,
                                  .saved = pass.saved,
                                  .targets = pass.targets,
                                  .partial = pass.partial,
                                  .tiles_per_split = plan.tiles_per_split,
                                  .with_rank = call.out.others != nullptr},
                                 plan, call.stream);
  return error == cudaSuccess ? pass.finish() : error;
}

template <class T>
cudaError_t backward_of(const BackwardCall& call, const CudaProblem& problem, const Plan& plan) {
  const BackwardWorkspace at(problem, plan);
  const rows::BackwardPass<T> pass(call, problem, at.rows, at.column_sums, plan.kept,
                                   plan.partial_counts());
  const GradientMatrix gradient{pass.workspace.bytes(at.gradient)};
  const CudaHead& head = call.head;
  const int64_t unit_stride = round_up(problem.D, 8);
  const UnitRows unit_x{pass.float16 ? pass.workspace.bytes(at.unit_x) : nullptr, unit_stride},
      unit_weight{pass.float16 ? pass.workspace.bytes(at.unit_weight) : nullptr, unit_stride};
  const auto matrix_of = [](const UnitRows& rows) {
    return MatrixRef{rows.data, DType::kFloat16, rows.stride, 1};
  };
  const CudaGradients& out = call.out;
  const bool class_outputs = out.weight.data || out.bias.data || out.kappa.data;

  cudaError_t error = pass.prepare({}, unit_x);
  for (int64_t begin = 0; begin < problem.C && error == cudaSuccess; begin += plan.chunk) {
    const Chunk chunk{begin, std::min(plan.chunk, problem.C - begin), plan.chunk};
    const auto launch_classes = [&](bool make_gradient, bool make_weight) {
      return launch_class_gradient<T>({.head = call.head,
                                       .out = out,
                                       .saved = pass.saved,
                                       .rows = pass.rows,
                                       .chunk = chunk,
                                       .gradient = gradient,
                                       .sums = pass.sums,
                                       .work = {.gradient = make_gradient,
                                                .weight = make_weight,
                                                .resident = plan.resident,
                                                .row_groups = plan.row_groups,
                                                .feature_splits = plan.feature_splits},
                                       .x = pass.float16 ? matrix_of(unit_x) : head.x,
                                       .with_sum = problem.with_sum},
                                      plan, call.stream);
    };
    if (plan.latency) {
      error = launch_classes(true, class_outputs);
    } else {
      error = launch_classes(true, false);
      if (error == cudaSuccess && class_outputs) error = launch_classes(false, true);
    }
    if (error != cudaSuccess || !out.x.data) continue;
    MatrixRef weight = head.weight;
    weight.data =
        static_cast<const char*>(weight.data) + begin * weight.row_stride * size_of(weight.dtype);
    if (pass.float16) {
      error = rows::launch_unit_rows(
          {.from = weight,
           .rnorm = reinterpret_cast<const float*>(pass.saved.weight_rnorm) + begin,
           .to = unit_weight,
           .lines = chunk.count,
           .elements = problem.D},
          call.stream);
      weight = matrix_of(unit_weight);
    }
    if (error == cudaSuccess)
      error = launch_input_gradient<T>({.N = problem.N,
                                        .D = problem.D,
                                        .chunk = chunk,
                                        .gradient = gradient,
                                        .weight = weight,
                                        .dx = pass.dx},
                                       plan, call.stream);
  }
  return error == cudaSuccess ? pass.finish() : error;
}

}  // namespace

cudaError_t forward(const ForwardCall& call, const CudaProblem& problem, const Plan& plan) {
  return plan.math == Math::kF64 ? forward_of<double>(call, problem, plan)
                                 : forward_of<float>(call, problem, plan);
}

cudaError_t backward(const BackwardCall& call, const CudaProblem& problem, const Plan& plan) {
  return plan.math == Math::kF64 ? backward_of<double>(call, problem, plan)
                                 : backward_of<float>(call, problem, plan);
}

}  // namespace tvmf::sm80
