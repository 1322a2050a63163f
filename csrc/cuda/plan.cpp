#include "cuda/plan.h"

namespace tvmf {

CudaPlan plan_cuda(const CudaProblem& problem, const Gpu& gpu) {
  // The first architecture that serves the problem. A new one gets a line here.
  const auto planned = [&](const auto& plan) {
    return CudaPlan{problem, cost_of(problem, plan, gpu), plan};
  };
  if (sm90::serves(problem, gpu)) return planned(sm90::make_plan(problem, gpu));
  static_assert(sm80::serves(CudaProblem{}, Gpu{}), "the last architecture serves what is left");
  return planned(sm80::make_plan(problem, gpu));
}

}  // namespace tvmf
