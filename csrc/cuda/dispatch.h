// The CUDA path without torch: its two passes. Nothing is allocated and nothing waits for the
// device.
#pragma once

#include "cuda/head.h"
#include "cuda/plan.h"

namespace tvmf {

cudaError_t cuda_forward(const CudaPlan& plan, const ForwardCall& call);
cudaError_t cuda_backward(const CudaPlan& plan, const BackwardCall& call);

}  // namespace tvmf
