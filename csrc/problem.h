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

// The buffer that the forward pass saves for the backward pass, in the compute dtype: offsets of
// its parts, in elements. It is one buffer, so that it costs a single allocation and autograd holds
// a single tensor. tvmf_ext/ops.py computes `size` too.
struct SavedLayout {
  SavedLayout(int64_t N, int64_t C, int64_t kept)
      : sum_exp(N),
        target_cosine(2 * N),
        target_logit(3 * N),
        x_rnorm(4 * N),
        weight_rnorm(5 * N),
        product(round_up(5 * N + C, kPad)),
        size(product + N * kept) {}
  int64_t max = 0, sum_exp, target_cosine, target_logit, x_rnorm, weight_rnorm, product;
  int64_t size;
};

// The parts of that buffer.
template <class T>
struct Saved {
  T* max;            // [N]  the largest logit of the other classes, or on Hopper the reference of
                     // the exponentials
  T* sum_exp;        // [N]  the sum over the other classes of exp(logit - max)
  T* target_cosine;  // [N]  c_{n,y} before its margins; 0 where the row has no target
  T* target_logit;   // [N]  z'_n, with the margins; 0 where the row has no target; of another
                     // shard's class the logit without margin and prior
  T* x_rnorm;        // [N]  1 / |x_n|
  T* weight_rnorm;   // [C]  1 / |w_c|, then zeros
  T* product;        // <x_n, w_c> of the first `kept` classes: [N, kept] on a GPU, where w_c is a
                     // unit row if it is float32 and x_n float16, and on Hopper what
                     // sm90::KeptLayout says; on the CPU one tile after another
  int64_t kept;      // on a GPU C or more, or 0 where no products are kept

  static Saved of(T* buffer, int64_t N, int64_t C, int64_t kept) {
    const SavedLayout at(N, C, kept);
    return {.max = buffer + at.max,
            .sum_exp = buffer + at.sum_exp,
            .target_cosine = buffer + at.target_cosine,
            .target_logit = buffer + at.target_logit,
            .x_rnorm = buffer + at.x_rnorm,
            .weight_rnorm = buffer + at.weight_rnorm,
            .product = buffer + at.product,
            .kept = kept};
  }
  // The same without the rows before n, where no products are kept.
  Saved from_row(int64_t n) const {
    return {.max = max + n,
            .sum_exp = sum_exp + n,
            .target_cosine = target_cosine + n,
            .target_logit = target_logit + n,
            .x_rnorm = x_rnorm + n,
            .weight_rnorm = weight_rnorm,
            .product = product,
            .kept = kept};
  }
};

enum class DType : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace tvmf
