// Plain structs that carry tensors to the kernels: the shape stands beside each pointer.
// N rows (samples), C classes, D features; a block is a run of classes whose tile stays in cache.
#pragma once

#include <cstdint>

namespace tvmf {

// Per-class terms of one block. `ld` is the block's width rounded up to whole vectors; the padding
// holds offset -inf, which no exponential sees, and else 0.
template <class T>
struct ClassTerms {
  const T* weight_rnorm;  // [ld]  q_c = 1 / max(|w_c|, eps)
  const T* kappa;         // [ld]
  const T* bias;          // [ld]
  const T* offset;        // [ld]  scale * bias_c + prior_c
  const T* omega;         // [ld]  class weight, or null where `sum` is not wanted
};

// One tile of the forward pass: partial statistics over a Range of its columns.
template <class T>
struct ForwardTile {
  const T* product;  // [N, ld]  <x_n, w_c>
  int64_t ld;
  int64_t count;          // classes, the columns before the padding
  const T* x_rnorm;       // [N]
  const int64_t* label;   // [N]  column of the target in this block; outside [0, ld) if not here
  const T* target_score;  // [N]  phi + bias of the target
  ClassTerms<T> terms;
  T scale;
  T* max;         // [N]  largest logit of the columns
  T* sum_exp;     // [N]  sum exp(logit - max)
  T* sum;         // [N]  sum omega * logit; written if terms.omega
  int64_t* rank;  // [N]  columns that do not score at or below the target
  T* target;      // [N]  logit of the target; written where its column is
};

// One tile of the backward pass: the gradient that both products use, and its row and column sums.
template <class T>
struct BackwardTile {
  const T* product;  // [N, ld]
  T* grad;           // [N, ld]  t_nc r_n q_c; may be `product` itself
  int64_t ld;
  const T* x_rnorm;      // [N]
  const int64_t* label;  // [N]
  const T* max;          // [N]  largest logit
  const T* sum_exp;      // [N]  sum exp(logit - max)
  const T* grad_lse;     // [N]
  const T* grad_target;  // [N]
  const T* grad_sum;     // [N]; read if terms.omega
  ClassTerms<T> terms;
  T scale;
  T* row_dot;    // [N]  sum_c t c over the columns
  T* row_scale;  // [N]  sum_c g (phi + bias) over the columns
  T* col_dot;    // [ld]  sum_n t c over the rows, added to
  T* col_bias;   // [ld]  sum_n g, or null
  T* col_kappa;  // [ld]  sum_n g dphi/dkappa; null if col_bias is
};

struct Range {
  int64_t begin, end;
};

// The CPU kernels of one instruction set; cpu_tile.cpp is compiled once for each.
template <class T>
struct TileKernels {
  // out[i] = 1 / max(|rows_i|, eps), rows [count, D] with row stride ld
  void (*rnorm)(const T* rows, int64_t ld, int64_t count, int64_t D, T* out);
  // out[i] = <x_i, w_i>, both [count, D]; w_i starts at w + row[i] * ld_w
  void (*dot)(const T* x, int64_t ld_x, const T* w, int64_t ld_w, const int64_t* row, int64_t count,
              int64_t D, T* out);
  // out[i] = phi(x_rnorm[i] w_rnorm[i] product[i]; kappa[i]) + bias[i]
  void (*score)(const T* product, const T* x_rnorm, const T* w_rnorm, const T* kappa, const T* bias,
                int64_t count, T* out);
  void (*forward)(const ForwardTile<T>& tile, Range rows, Range cols);
  void (*backward)(const BackwardTile<T>& tile, Range rows, Range cols);
  // out_i = factor[i] rows_i, or added to it; rows [count, D] with row stride ld, out [count, D]
  void (*multiply)(const T* rows, int64_t ld, const T* factor, int64_t count, int64_t D, T* out);
  void (*multiply_add)(const T* rows, int64_t ld, const T* factor, int64_t count, int64_t D,
                       T* out);
  // out += in
  void (*add)(const T* in, int64_t count, T* out);
};

// The best instruction set that this machine has and this build carries.
const char* cpu_capability();
template <class T>
const TileKernels<T>& tile_kernels();

}  // namespace tvmf
