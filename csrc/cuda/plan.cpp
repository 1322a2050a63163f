#include "cuda/plan.h"

namespace tvmf {
namespace {

const char* name_of(Math math) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "TF32", "float32", "float64"};
  return kNames[int(math)];
}

void add_pass(std::vector<PlanField>& fields, const std::string& pass, const PassCost& cost) {
  fields.push_back({pass + "_launches", cost.launches});
  fields.push_back({pass + "_workspace", cost.workspace});
  fields.push_back({pass + "_flops", cost.flops});
  fields.push_back({pass + "_hbm", cost.hbm});
  fields.push_back({pass + "_l2", cost.l2});
  fields.push_back({pass + "_seconds", cost.seconds});
}

}  // namespace

CudaPlan plan_cuda(const CudaProblem& problem, const Gpu& gpu) {
  // The first architecture that serves the problem. A new one gets a line here.
  const auto planned = [&](const auto& plan) {
    return CudaPlan{problem, cost_of(problem, plan, gpu), plan};
  };
  if (sm90::serves(problem, gpu)) return planned(sm90::make_plan(problem, gpu));
  static_assert(sm80::serves(CudaProblem{}, Gpu{}), "the last architecture serves what is left");
  return planned(sm80::make_plan(problem, gpu));
}

std::vector<PlanField> fields_of(const CudaPlan& plan) {
  std::vector<PlanField> fields{{"math", name_of(plan.problem.math())},
                                {"saved", plan.cost.saved},
                                {"l2_rate", plan.cost.l2_rate},
                                {"flop_rate", plan.cost.flop_rate}};
  add_pass(fields, "forward", plan.cost.forward);
  add_pass(fields, "backward", plan.cost.backward);
  const auto own = std::visit([](const auto& variant) { return fields_of(variant); }, plan.variant);
  fields.insert(fields.end(), own.begin(), own.end());
  return fields;
}

}  // namespace tvmf
