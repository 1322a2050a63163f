// How a problem is cut into launches, blocks and tiles on a GPU, and what that costs. Each
// architecture has a plan of its own (sm80/plan.h, sm90/plan.h).
#pragma once

#include <variant>

#include "cuda/cost.h"
#include "cuda/sm80/plan.h"
#include "cuda/sm90/plan.h"

namespace tvmf {

struct CudaPlan {
  CudaProblem problem;
  std::variant<sm80::Plan, sm90::Plan> variant;  // of the architecture whose kernels run
  Memory memory;

  // Whether the gradients of classes are sums of several launches, so that they must be
  // float32, whatever the dtype of the parameter.
  bool adds_gradients() const {
    return std::visit([](const auto& plan) { return plan.adds_gradients(); }, variant);
  }
};

// The one place that decides which architecture's kernels serve a problem.
CudaPlan plan_cuda(const CudaProblem& problem, const Gpu& gpu);

// What the kernels that serve the problem keep of its products, whatever its number of rows is.
KeptProducts kept_products(const CudaProblem& problem, const Gpu& gpu);

// What the plan costs by count, and the time that follows on this GPU. No call of the kernels needs
// it.
Cost cost_of(const CudaPlan& plan, const Gpu& gpu);

// The plan's numbers by name: those that every architecture has, then those of the variant.
std::vector<PlanField> fields_of(const CudaPlan& plan, const Gpu& gpu);

}  // namespace tvmf
