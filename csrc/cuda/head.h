// The arguments of a call on CUDA, without torch: tensors as pointers to device memory, their
// dtypes and their strides.
#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace tvmf {

struct MatrixRef {
  const void* data;
  DType dtype;
  int64_t row_stride, col_stride;  // in elements, any
};

// One value per class, or one for all (stride 0), or a number (data null).
struct VectorRef {
  const void* data;
  DType dtype;
  int64_t stride;
  double value;
};

// A gradient to be written, contiguous, or null where it is not wanted.
struct GradientRef {
  void* data;
  DType dtype;
};

// Here T is float, or double for float64 features.
struct CudaHead {
  int64_t N, C, D;
  MatrixRef x;            // [N, D]
  MatrixRef weight;       // [C, D]  of the features' dtype; float32 also with 16-bit features
  const int64_t* target;  // [N]
  int64_t target_stride;
  VectorRef kappa;                          // [C]
  VectorRef scale;                          // []
  VectorRef bias;                           // [C]
  VectorRef prior;                          // [C]
  VectorRef class_weight;                   // [C]
  VectorRef cosine_margin, angular_margin;  // [C]
  VectorRef target_score;                   // [N]  of a shard's row statistics
  bool softplus_scale;
  int64_t ignore_index;
  int* bad_label;  // mapped host memory; set to 1 by a label that names no class
};

struct CudaStatistics {
  void* others;   // [N] T
  void* cosine;   // [N] T
  void* sum;      // [N] T, or null
  int64_t* rank;  // [N]
  void* loss;     // [] or, unreduced, [N] T; null where statistics are wanted
};

// Either the loss's gradient or those of the statistics; absent ones have null data and value 0.
struct CudaUpstream {
  VectorRef loss;                 // [N], or [] (stride 0) where reduced
  VectorRef others, cosine, sum;  // [N]
};

struct CudaGradients {
  GradientRef x;       // [N, D]
  GradientRef weight;  // [C, D]
  GradientRef kappa;   // [C] or, where kappa has stride 0, []
  GradientRef scale;   // []
  GradientRef bias;    // [C]
};

// One call of the forward pass. Statistics are written where their pointers are not null, and so is
// the loss, by `options`.
struct ForwardCall {
  CudaHead head;
  LossOptions options;
  CudaStatistics out;
  void* saved;      // SavedLayout's elements of T
  void* workspace;  // the plan's bytes, 256-byte aligned
  cudaStream_t stream;
};

struct BackwardCall {
  CudaHead head;
  LossOptions options;
  CudaUpstream upstream;
  CudaGradients out;
  const void* saved;
  void* workspace;
  cudaStream_t stream;
};

}  // namespace tvmf
