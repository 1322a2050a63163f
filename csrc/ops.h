// The operators between bind.cpp, which checks, and the kernels: one struct per call.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "plan.h"

namespace tvmf {

using torch::stable::Tensor;

enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

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
};

struct LossOptions {
  double label_smoothing;
  Reduction reduction;
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

// One buffer in the compute dtype: a single allocation, and a single tensor for autograd to hold.
struct SavedLayout {
  SavedLayout(int64_t N, int64_t C, int64_t kept)
      : sum_exp(N),
        target_product(2 * N),
        x_rnorm(3 * N),
        weight_rnorm(4 * N),
        product(round_up(4 * N + C, kPad)),
        size(product + N * kept) {}
  int64_t max = 0;         // [N]  largest logit
  int64_t sum_exp;         // [N]  sum exp(logit - max): lse itself would lose the small losses
  int64_t target_product;  // [N]  <x_n, w_y>
  int64_t x_rnorm;         // [N]
  int64_t weight_rnorm;    // [C], then zeros
  int64_t product;         // [N * kept]  <x_n, w_c> of the first classes, tile after tile
  int64_t size;
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

}  // namespace tvmf
