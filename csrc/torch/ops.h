// The operators as bind.cpp, which checks their arguments, calls them on the CPU and on CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>

#include "cuda/gpus.h"
#include "problem.h"
#include "torch/schema.h"

namespace tvmf {

using torch::stable::Tensor;

// z_nc = scale (phi(cosine(x_n, w_c); kappa_c) + bias_c) + prior_c
struct Head {
  TVMF_HEAD(TVMF_AS_FIELD)
};

struct RowStatistics {
  Tensor lse;     // [N]
  Tensor target;  // [N]
  Tensor sum;     // [N], or [0] where not wanted
  Tensor rank;    // [N] int64
  Tensor saved;   // for the backward pass: SavedLayout
};

struct Loss {
  Tensor loss;  // [] or, unreduced, [N]
  Tensor saved;
};

enum GradBits : int64_t { kInput = 1, kWeight = 2, kKappa = 4, kScale = 8, kBias = 16 };

struct Gradients {
  Tensor input, weight, kappa, scale, bias;  // [0] where not wanted
};

// The four operators of a device. `kept`: classes whose products the forward pass keeps; `wanted`:
// GradBits of the gradients to be made.
#define TVMF_OPERATORS(device)                                                                    \
  RowStatistics device##_row_statistics(const Head& head, bool with_sum, int64_t kept);           \
  Gradients device##_row_statistics_backward(                                                     \
      const Head& head, const Tensor& saved, int64_t kept, const std::optional<Tensor>& grad_lse, \
      const std::optional<Tensor>& grad_target, const std::optional<Tensor>& grad_sum,            \
      int64_t wanted);                                                                            \
  Loss device##_cross_entropy(const Head& head, const LossOptions& options, int64_t kept);        \
  Gradients device##_cross_entropy_backward(const Head& head, const LossOptions& options,         \
                                            const Tensor& saved, int64_t kept,                    \
                                            const Tensor& grad_loss, int64_t wanted);
TVMF_OPERATORS(cpu)
TVMF_OPERATORS(cuda)
#undef TVMF_OPERATORS

// The description of a device. Throws for one on which the kernels do not run.
const Gpu& cuda_gpu(int32_t device);

inline Tensor to_dtype(const Tensor& tensor, torch::headeronly::ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  return torch::stable::to(tensor, dtype);
}

// A contiguous tensor. The shim itself: the dispatcher's route costs more than a small head.
inline Tensor empty_on(int32_t device_type, int32_t device_index,
                       torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       torch::headeronly::ScalarType dtype) {
  std::array<int64_t, 2> strides{1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(sizes[1], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

}  // namespace tvmf
