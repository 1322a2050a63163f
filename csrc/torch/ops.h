// The four operators as bind.cpp calls them after its checks: one implementation for each device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "problem.h"
#include "torch/schema.h"

namespace tvmf {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The logits are z_nc = scale (phi(cosine(x_n, w_c); kappa_c) + bias_c) + prior_c. The margins are
// those of the target's cosine.
struct Head {
  TVMF_HEAD(TVMF_AS_FIELD)
};

struct RowStatistics {
  Tensor others;  // [N]  log sum_{c != y} exp z_nc
  Tensor cosine;  // [N]  of the target, before its margins
  Tensor sum;     // [N]  sum_{c != y} omega_c z_nc, or [0] where it is not wanted
  Tensor rank;    // [N] int64
  Tensor saved;   // the buffer that SavedLayout describes, for the backward pass
};

// Gradients of the row statistics; an absent one is zero.
struct StatisticsGradients {
  OptionalTensor others, cosine, sum;  // [N]
};

struct Loss {
  Tensor loss;   // [], or [N] where it is not reduced
  Tensor saved;  // as in RowStatistics
};

// Gradients by the head's arguments, each [0] where it is not wanted.
struct Gradients {
  Tensor input, weight, kappa, scale, bias;
};

// The bits of `wanted`: one for each field of Gradients, in the same order.
enum GradBits : int64_t { kInput = 1, kWeight = 2, kKappa = 4, kScale = 8, kBias = 16 };

// `kept` classes have their products in `saved` (SavedLayout).
struct Backend {
  RowStatistics (*row_statistics)(const Head&, bool with_sum, int64_t kept);
  Gradients (*row_statistics_backward)(const Head&, const StatisticsGradients&, int64_t kept,
                                       const Tensor& saved, int64_t wanted);
  Loss (*cross_entropy)(const Head&, const LossOptions&, int64_t kept);
  Gradients (*cross_entropy_backward)(const Head&, const LossOptions&, const Tensor& grad_loss,
                                      int64_t kept, const Tensor& saved, int64_t wanted);
};

extern const Backend kCpuBackend;   // cpu_call.cpp
extern const Backend kCudaBackend;  // cuda_call.cpp, in builds with CUDA

// Throws std::out_of_range where a finished call on the CUDA device had a label that names no class
// and no call has raised for it yet. cuda_call.cpp, in builds with CUDA.
void check_targets(int64_t device);

}  // namespace tvmf
