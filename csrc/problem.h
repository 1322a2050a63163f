// The problem that every path solves: its dtypes, the loss's options, and the buffer that the
// forward pass saves for the backward pass. N rows, C classes, D features.
#pragma once

#include <cstdint>

namespace tvmf {

// Row strides of product tiles are multiples of this: whole 64-byte vectors of float and double.
constexpr int64_t kPad = 16;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

struct LossOptions {
  double label_smoothing;
  Reduction reduction;
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
  int64_t max = 0;         // [N]  largest logit, or on Hopper what exponentials are relative to
  int64_t sum_exp;         // [N]  sum exp(logit - max): lse itself would lose the small losses
  int64_t target_product;  // [N]  <x_n, w_y>
  int64_t x_rnorm;         // [N]
  int64_t weight_rnorm;    // [C], then zeros
  int64_t product;  // [N * kept]  <x_n, w_c> of the first classes: on the CPU tile after tile, on a
                    // GPU [N, kept] and of all classes or none
  int64_t size;
};

enum class DType : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace tvmf
