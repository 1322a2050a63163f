#include "cuda/dispatch.h"

#include "cuda/sm80/sm80.h"
#include "cuda/sm90/sm90.h"

namespace tvmf {

// The plan's type names the architecture, in whose namespace forward and backward are found.
cudaError_t cuda_forward(const CudaPlan& plan, const ForwardCall& call) {
  return std::visit([&](const auto& variant) { return forward(call, plan.problem, variant); },
                    plan.variant);
}

cudaError_t cuda_backward(const CudaPlan& plan, const BackwardCall& call) {
  return std::visit([&](const auto& variant) { return backward(call, plan.problem, variant); },
                    plan.variant);
}

}  // namespace tvmf
