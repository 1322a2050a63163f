// What the kernels of a pass are given, and what both directions know of a row or class of zeros.
#pragma once

#include "epilogue.cuh"

namespace tvmf {

template <class T>
struct ForwardParams {
  CudaHead head;
  LossOptions options;
  CudaStatistics out;
  SavedLayout layout;
  T* saved;      // SavedLayout
  int64_t kept;  // row stride of the saved products, or 0
  bool with_sum;
  int64_t tiles_per_split, splits;

  int64_t* label;   // [N]  -1: ignored, -2: names no class
  T* target_score;  // [N]  phi + bias of the target
  T* target;        // [N]  logit of the target
  T* max;           // [splits, N]
  T* sum_exp;       // [splits, N]
  T* sum;           // [splits, N], or null
  int* rank;        // [splits, N]
  bool target_apart;  // sum_exp is without the target's
};

// A row's part in every class's gradient.
template <class T>
struct alignas(16) GradientRow {
  T rnorm, rnorm_gain;  // rnorm_gain = rnorm * gain: what the gradient tile is multiplied by
  T max, inv_sum_exp;
  T grad_lse, grad_target, grad_sum, target_product;
  int64_t label, padding;  // in 16 bytes, which are all written: they are read as a whole
};

template <class T>
struct BackwardParams {
  CudaHead head;
  LossOptions options;
  CudaUpstream upstream;
  CudaGradients out;
  SavedLayout layout;
  const T* saved;  // SavedLayout
  int64_t kept;
  bool with_sum, float16;

  int64_t chunk;                     // row stride of `grad`, a multiple of 64
  int64_t chunk_begin, chunk_count;  // classes of this launch
  bool make_gradient, make_weight;   // what this launch does; `fused` where both
  bool fused, resident;
  int64_t row_groups, feature_splits, input_splits, total_count;

  GradientRow<T>* rows;  // [N]
  T* gain;               // [2]  a power of two that keeps float16 in range, and 1 / it
  void* grad;            // [N, chunk] X  t_nc r_n q_c gain
  T* row_dot;            // [dot_slots, N]  sum_c t c of each warp's classes, over all chunks
  T* col_sums;           // [slots, 3, chunk]  sum_n of t c, g, g dphi/dkappa
  T* dx;                 // [input_splits, N, D]  over all chunks
  double* totals;        // [total_count, 2]  sum g (phi + bias), sum g dphi/dkappa, over all chunks
  int64_t dot_slots;
};

// A row or class of zeros has rnorm 1e12, too large for float16; its elements are 0, so any factor
// will do inside the products, and the true one is applied to their sums.
template <class T>
__device__ __forceinline__ T inner_rnorm(T rnorm, bool float16) {
  return float16 && rnorm > T(0.5 / kEps) ? T(1) : rnorm;
}
template <class T>
__device__ __forceinline__ T projection(T dot, T rnorm) {
  return rnorm < T(1 / kEps) ? dot * rnorm * rnorm : T(0);
}

}  // namespace tvmf
