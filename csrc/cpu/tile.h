// The tile kernels of the CPU path: everything that is done with the product of N rows and one
// block of classes. Plain structs carry the arguments, each shape beside its pointer. N rows, C
// classes, D features; `stride` is a block's number of classes rounded up to whole vectors.
#pragma once

#include <cstdint>

namespace tvmf::cpu {

// The most columns that one call of `forward` takes. Their logits lie on the stack between the
// search for the maximum and the exponentials, and with their class terms they stay in the
// first-level cache.
constexpr int64_t kStripe = 512;

// The terms of a block's classes. Beyond the last class the offset is -inf, so that the exponential
// of such a logit is 0, and the other terms are 0.
template <class T>
struct ClassTerms {
  const T* weight_rnorm;  // [stride]  q_c = 1 / max(|w_c|, eps)
  const T* kappa;         // [stride]
  const T* bias;          // [stride]
  const T* offset;        // [stride]  scale * bias_c + prior_c
  const T* class_weight;  // [stride]  null where the sum over classes is not wanted
};

// The forward pass of one tile: statistics of each row over a range of columns, without its target.
template <class T>
struct ForwardTile {
  const T* product;  // [N, stride]  <x_n, w_c>
  int64_t stride;
  int64_t count;          // columns that hold a class; the rest is padding
  const T* x_rnorm;       // [N]
  const int64_t* column;  // [N]  of the row's target, or -1 where it is not in this block
  const T* target_score;  // [N]  phi + bias of the target, before its margins
  ClassTerms<T> terms;
  T scale;
  T* max;         // [N]  largest logit of the range
  T* sum_exp;     // [N]  sum of exp(logit - max)
  T* sum;         // [N]  sum of class_weight * logit; written if terms.class_weight
  int64_t* rank;  // [N]  columns that do not score at or below the target
};

// The gradients of one row's statistics, and of its target.
template <class T>
struct RowGradient {
  T others, sum;   // dL/dothers and dL/dsum
  T score;         // what is subtracted from each score in row_scale
  T cosine;        // of the target
  T by_cosine;     // the target's t = dL/dcosine
  T by_logit;      // the target's g = dL/dlogit
  T by_phi_kappa;  // the target's g dphi/dkappa
};

// The backward pass of one tile: the gradient that both products take, and its sums along rows and
// columns. g = dL/dlogit, t = dL/dcosine.
template <class T>
struct BackwardTile {
  const T* product;  // [N, stride]
  T* grad;           // [N, stride]  t_nc r_n q_c; may be the memory of `product`
  int64_t stride;
  const T* x_rnorm;                // [N]
  const int64_t* column;           // [N]
  const T* max;                    // [N]  largest logit of the other classes
  const T* sum_exp;                // [N]  sum of exp(logit - max) over the other classes
  const RowGradient<T>* gradient;  // [N]  `sum` is read if terms.class_weight
  ClassTerms<T> terms;
  T scale;
  T* row_dot;    // [N]  sum over the range's columns of t c
  T* row_scale;  // [N]  sum over the range's columns but the target of g (phi + bias - score)
  T* col_dot;    // [stride]  the sum over the range's rows of t c is added to it
  T* col_bias;   // [stride]  so is that of g; null where it is not wanted
  T* col_kappa;  // [stride]  so is that of g dphi/dkappa; null where col_bias is
};

struct TargetProduct {
  double product, cosine;
};

struct Range {
  int64_t begin, end;
};

// The kernels of one instruction set. tile.cpp is compiled once for each.
template <class T>
struct TileKernels {
  // out[i] = 1 / max(|rows_i|, eps), rows [count, D] with the given row stride
  void (*rnorm)(const T* rows, int64_t row_stride, int64_t count, int64_t D, T* out);
  // Of x and w, both [D], with float64 sums: phi' multiplies the cosine's error in an easy row.
  TargetProduct (*target)(const T* x, const T* w, int64_t D);
  // phi + bias of one class, from its product with one row, as `forward` computes it
  T (*score)(T product, T x_rnorm, T weight_rnorm, T kappa, T bias);
  void (*forward)(const ForwardTile<T>& tile, Range rows, Range cols);
  void (*backward)(const BackwardTile<T>& tile, Range rows, Range cols);
  // out_i = factor[i] rows_i; rows [count, D] with the given row stride, out [count, D]
  void (*multiply)(const T* rows, int64_t row_stride, const T* factor, int64_t count, int64_t D,
                   T* out);
  // out_i += factor[i] rows_i
  void (*multiply_add)(const T* rows, int64_t row_stride, const T* factor, int64_t count, int64_t D,
                       T* out);
  // out += in
  void (*add)(const T* in, int64_t count, T* out);
};

}  // namespace tvmf::cpu
