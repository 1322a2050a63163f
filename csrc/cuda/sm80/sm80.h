// The portable path's two passes, each a sequence of launches.
#pragma once

#include "cuda/head.h"
#include "cuda/sm80/plan.h"

namespace tvmf::sm80 {

cudaError_t forward(const ForwardCall& call, const CudaProblem& problem, const Plan& plan);
cudaError_t backward(const BackwardCall& call, const CudaProblem& problem, const Plan& plan);

}  // namespace tvmf::sm80
