// Named views of the memory that the kernels share: each shape stands beside its pointer and is the
// same on every architecture. T is float, or double for float64 features.
#pragma once

#include "cuda/head.h"

namespace tvmf {

template <class T>
struct RowTargets {
  int64_t* label;  // [N]  -1: the row is ignored; -2: its label names no class
  T* score;        // [N]  phi + bias of the target
  T* logit;        // [N]  of the target
};

// Statistics of each row over each of `count` runs of classes.
template <class T>
struct PartialStatistics {
  T* max;      // [count, N]
  T* sum_exp;  // [count, N]
  T* sum;      // [count, N], unused unless with_sum
  int* rank;   // [count, N]
  int64_t count;
  bool with_sum;
};

// A row's part in the gradients of all classes. The padding makes whole 16-byte accesses of it.
template <class T>
struct alignas(16) GradientRow {
  T rnorm;
  T scaled_rnorm;  // rnorm * loss scale, the factor of the row's gradient tile
  T max, inv_sum_exp;
  T grad_lse, grad_target, grad_sum;  // dL/dlse, dL/dtarget, dL/dsum
  T target_product;
  int64_t label, padding;
};

template <class T>
struct GradientRows {
  GradientRow<T>* rows;  // [N]
  T* loss_scale;         // [2]  a power of two that keeps float16 in range, and its inverse
};

// The run of classes that one launch of the backward pass works on.
struct Chunk {
  int64_t begin, count;
  int64_t size;  // classes of every chunk but the last
};

// Sums over the gradient tiles. Each slot has a partial sum, and slots are added up in order.
template <class T>
struct GradientSums {
  T* row_dot;      // [slots, N]  sum_c t c, over all chunks
  T* columns;      // [slots, 3, chunk.size]  sum_n of t c, of g and of g dphi/dkappa
  double* totals;  // [slots, 2]  sum of g (phi + bias) and of g dphi/dkappa, over all chunks
};

// The gradient of the features before its projection, over all chunks.
template <class T>
struct PartialFeatures {
  T* data;  // [count, N, D]
  int64_t count;
};

}  // namespace tvmf
