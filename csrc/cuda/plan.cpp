#include "cuda/plan.h"

#include <sstream>

namespace tvmf {
namespace {

const char* name_of(Math math) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "TF32", "float32", "float64"};
  return kNames[int(math)];
}

// Each kernel as "name:launches:seconds", in the order in which they are launched first.
std::string kernels_text(const PassCost& cost) {
  std::ostringstream text;
  text.precision(17);
  for (const KernelCost& kernel : cost.kernels)
    text << (text.tellp() > 0 ? "," : "") << kernel.name << ":" << kernel.launches << ":"
         << kernel.seconds;
  return text.str();
}

void add_pass(std::vector<PlanField>& fields, const std::string& pass, const PassCost& cost,
              int64_t workspace) {
  fields.push_back({pass + "_launches", cost.sum(&KernelCost::launches)});
  fields.push_back({pass + "_workspace", workspace});
  fields.push_back({pass + "_flops", cost.sum(&KernelCost::flops)});
  fields.push_back({pass + "_hbm", cost.sum(&KernelCost::hbm)});
  fields.push_back({pass + "_l2", cost.sum(&KernelCost::l2)});
  fields.push_back({pass + "_products", cost.sum(&KernelCost::products)});
  fields.push_back(
      {pass + "_between", cost.sum(&KernelCost::between) + cost.sum(&KernelCost::alone)});
  fields.push_back({pass + "_seconds", cost.sum(&KernelCost::seconds)});
  fields.push_back({pass + "_kernels", kernels_text(cost)});
}

}  // namespace

CudaPlan plan_cuda(const CudaProblem& problem, const Gpu& gpu) {
  // The first architecture that serves the problem. A new one gets a line here.
  const auto planned = [&](const auto& plan) {
    return CudaPlan{problem, plan, memory_of(problem, plan)};
  };
  if (sm90::serves(problem, gpu)) return planned(sm90::make_plan(problem, gpu));
  static_assert(sm80::serves(CudaProblem{}, Gpu{}), "the last architecture serves what is left");
  return planned(sm80::make_plan(problem, gpu));
}

KeptProducts kept_products(const CudaProblem& problem, const Gpu& gpu) {
  if (sm90::serves(problem, gpu)) return sm90::kept_products(problem, gpu);
  return {.most_rows = kMostRows, .row_multiple = 1, .beside = 0};
}

Cost cost_of(const CudaPlan& plan, const Gpu& gpu) {
  return std::visit([&](const auto& variant) { return cost_of(plan.problem, variant, gpu); },
                    plan.variant);
}

std::vector<PlanField> fields_of(const CudaPlan& plan, const Gpu& gpu) {
  const Cost cost = cost_of(plan, gpu);
  std::vector<PlanField> fields{{"math", name_of(plan.problem.math())},
                                {"saved", plan.memory.saved}};
  add_pass(fields, "forward", cost.forward, plan.memory.forward);
  add_pass(fields, "backward", cost.backward, plan.memory.backward);
  const auto own = std::visit([](const auto& variant) { return fields_of(variant); }, plan.variant);
  fields.insert(fields.end(), own.begin(), own.end());
  return fields;
}

}  // namespace tvmf
