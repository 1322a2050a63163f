// The operators between bind.cpp, which checks, and the kernels: one struct per call.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>

#include "cuda/gpus.h"
#include "problem.h"

namespace tvmf {

using torch::stable::Tensor;

// z_nc = scale (phi(cosine(x_n, w_c); kappa_c) + bias_c) + prior_c
struct Head {
  Tensor input;                 // [N, D]
  Tensor weight;                // [C, D]
  Tensor target;                // [N] int64
  std::optional<Tensor> kappa;  // [] or [1] or [C]; kappa_value where absent
  double kappa_value;
  std::optional<Tensor> scale;  // [] or [1]; scale_value where absent
  double scale_value;
  bool softplus_scale;                 // the scale is softplus(scale) + 1 of what is given
  std::optional<Tensor> bias;          // [C]
  std::optional<Tensor> prior;         // [C]
  std::optional<Tensor> class_weight;  // [C]
  int64_t ignore_index;
  bool allow_tf32;  // float32 products on CUDA may be rounded to TF32
};

struct RowStatistics {
  Tensor lse;     // [N]
  Tensor target;  // [N]
  Tensor sum;     // [N], or [0] where not wanted
  Tensor rank;    // [N] int64
  Tensor saved;   // what the backward pass needs, laid out by SavedLayout
};

struct Loss {
  Tensor loss;  // [] or, unreduced, [N]
  Tensor saved;
};

enum GradBits : int64_t { kInput = 1, kWeight = 2, kKappa = 4, kScale = 8, kBias = 16 };

struct Gradients {
  Tensor input, weight, kappa, scale, bias;  // [0] where not wanted
};

RowStatistics cpu_row_statistics(const Head& head, bool with_sum, int64_t kept);
Gradients cpu_row_statistics_backward(const Head& head, const Tensor& saved, int64_t kept,
                                      const std::optional<Tensor>& grad_lse,
                                      const std::optional<Tensor>& grad_target,
                                      const std::optional<Tensor>& grad_sum, int64_t wanted);

Loss cpu_cross_entropy(const Head& head, const LossOptions& options, int64_t kept);
Gradients cpu_cross_entropy_backward(const Head& head, const LossOptions& options,
                                     const Tensor& saved, int64_t kept, const Tensor& grad_loss,
                                     int64_t wanted);

RowStatistics cuda_row_statistics(const Head& head, bool with_sum, int64_t kept);
Gradients cuda_row_statistics_backward(const Head& head, const Tensor& saved, int64_t kept,
                                       const std::optional<Tensor>& grad_lse,
                                       const std::optional<Tensor>& grad_target,
                                       const std::optional<Tensor>& grad_sum, int64_t wanted);

Loss cuda_cross_entropy(const Head& head, const LossOptions& options, int64_t kept);
Gradients cuda_cross_entropy_backward(const Head& head, const LossOptions& options,
                                      const Tensor& saved, int64_t kept, const Tensor& grad_loss,
                                      int64_t wanted);

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
