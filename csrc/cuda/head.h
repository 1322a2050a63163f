// The CUDA path without torch: what bind.cpp fills in, and the two functions that run the kernels.
// Pointers are device memory; nothing is allocated, nothing waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/plan.h"

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
  VectorRef kappa;         // [C]
  VectorRef scale;         // []
  VectorRef bias;          // [C]
  VectorRef prior;         // [C]
  VectorRef class_weight;  // [C]
  bool softplus_scale;
  int64_t ignore_index;
  int* bad_label;  // mapped host memory; set to 1 by a label that names no class
};

struct CudaStatistics {
  void* lse;      // [N] T
  void* target;   // [N] T
  void* sum;      // [N] T, or null
  int64_t* rank;  // [N]
  void* loss;     // [] or, unreduced, [N] T; null where statistics are wanted
};

// Either the loss's gradient or those of the statistics; absent ones have null data and value 0.
struct CudaUpstream {
  VectorRef loss;              // [N], or [] (stride 0) where reduced
  VectorRef lse, target, sum;  // [N]
};

struct CudaGradients {
  GradientRef x;       // [N, D]
  GradientRef weight;  // [C, D]
  GradientRef kappa;   // [C] or, where kappa has stride 0, []
  GradientRef scale;   // []
  GradientRef bias;    // [C]
};

// `saved` is laid out by SavedLayout in T, `workspace` has the plan's bytes, 256-byte aligned.
// Statistics are written where their pointers are not null, the loss (with `options`) likewise.
cudaError_t cuda_forward(const CudaHead& head, const LossOptions& options, const CudaPlan& plan,
                         const CudaStatistics& out, void* saved, void* workspace,
                         cudaStream_t stream);

cudaError_t cuda_backward(const CudaHead& head, const LossOptions& options, const CudaPlan& plan,
                          const CudaUpstream& upstream, const CudaGradients& out, const void* saved,
                          void* workspace, cudaStream_t stream);

}  // namespace tvmf
