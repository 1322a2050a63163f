// The way to the kernels for Hopper: 16-bit features, float32 weights that bulk copies can read.
#pragma once

#include "cuda/passes.cuh"
#include "cuda/sm90/mainloop.cuh"

namespace tvmf::sm90 {

// Calls f with the plan's kind of 16-bit product and its shape of cosine tiles.
template <class F>
cudaError_t with_cosine_shape(const CudaPlan& plan, const F& f) {
  const auto with_math = [&](auto shape) {
    return plan.math == Math::kBf16 ? f(MathConstant<Math::kBf16>{}, shape)
                                    : f(MathConstant<Math::kF16>{}, shape);
  };
  return plan.hopper.few ? with_math(CosineShape<128, true>{})
                         : with_math(CosineShape<256, false>{});
}

// Both want the arranged features in `p`.
cudaError_t row_statistics(const ForwardParams<float>& p, const CudaPlan& plan,
                           cudaStream_t stream);

// All chunks of classes: weights', bias', kappa's gradients and the sums that are left to finish.
// p.grad is [chunk, grad_stride] here, a class a line; `rounded` [chunk, weight_stride] takes the
// chunk's weights.
cudaError_t class_gradients(const BackwardParams<float>& p, const CudaPlan& plan, void* rounded,
                            cudaStream_t stream);

}  // namespace tvmf::sm90
