// Named views of the memory that the kernels share: each shape stands beside its pointer and is the
// same on every architecture. T is float, or double for float64 features.
#pragma once

#include "cuda/head.h"

namespace tvmf {

template <class T>
struct RowTargets {
  int64_t* label;  // [N]  a class, kIgnored, kWrong or kElsewhere
  T* score;        // [N]  phi + bias of the target, before its margins
};

// Statistics of each row over each of `count` runs of classes, without its target.
template <class T>
struct PartialStatistics {
  T* max;      // [count, N]
  T* sum_exp;  // [count, N]
  T* sum;      // [count, N], unused unless with_sum
  int* rank;   // [count, N]
  int64_t count;
  bool with_sum;
};

// A row's part in the gradients of all classes but its target. Whole 16-byte accesses read it.
template <class T>
struct alignas(16) GradientRow {
  T rnorm;
  T scaled_rnorm;  // rnorm, in float16 that of the unit row, times the loss scale: the factor of
                   // the row's gradient tile
  T max;
  T others;  // dL/dothers / sum_exp
  T sum;     // dL/dsum
  int64_t label;
};

// The gradient of a row's target, which replaces that of other classes in its element.
template <class T>
struct alignas(16) TargetGradient {
  T cosine;
  T by_cosine;     // t = dL/dcosine
  T by_logit;      // g = dL/dlogit
  T phi_by_kappa;  // dphi/dkappa
};

template <class T>
struct GradientRows {
  GradientRow<T>* rows;        // [N]
  TargetGradient<T>* targets;  // [N]
  T* loss_scale;               // [2]  a power of two that keeps float16 in range, and its inverse
  double* scale_rest;          // []  what GradientSums::totals lacks of the scale's gradient
};

// Copies of rows of x or of the weight, in the features' dtype, whose norm is about 2^8. They are
// the operands of float16 products with the gradient.
struct UnitRows {
  void* data;      // [rows, stride], null where the given rows are the operands
  int64_t stride;  // their elements, rounded up to 8
};

// Rows that a pass works on at a time, from `begin` on, of `all`. The head, the saved values and
// the gradients that the kernels get are those of the segment.
struct RowSegment {
  int64_t begin, all;
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
  double* totals;  // [slots, 2]  over all chunks, sum_{c != y} g (z - max - prior) and
                   // sum g dphi/dkappa
};

// The gradient of the features before its projection, over all chunks.
template <class T>
struct PartialFeatures {
  T* data;  // [count, N, D]
  int64_t count;
};

}  // namespace tvmf
