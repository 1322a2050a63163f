// The kernels of the portable path, which multiply: their parameters and their launches. T is
// float, or double for float64 features.
#pragma once

#include "cuda/sm80/plan.h"
#include "cuda/views.h"

namespace tvmf::sm80 {

template <class T>
struct StatisticsParams {
  CudaHead head;
  Saved<T> saved;  // writes weight_rnorm, unless prepare_rows has, and product where it is kept
  RowTargets<T> targets;
  PartialStatistics<T> partial;  // writes it
  int64_t tiles_per_split;
  bool with_rank;  // whether ranks are wanted; they are 0 otherwise
};

template <class T>
cudaError_t launch_statistics(const StatisticsParams<T>& p, const Plan& plan, cudaStream_t stream);

// The chunk's gradients with respect to the cosines, as the products read them: element [n, c] is
// t_nc r_n q_c times the loss scale, in float16 with the r_n and q_c of unit rows.
struct GradientMatrix {
  void* data;  // [N, chunk.size] of the features' dtype
};

// The work of one launch of class_gradient. Where a launch does both parts, every block makes the
// gradient tile that its share of the weight gradient needs.
struct ClassWork {
  bool gradient;           // make the gradient tile
  bool weight;             // make the gradients of the weight, the bias and kappa
  bool resident;           // the tile of all rows stays in shared memory
  int64_t row_groups;      // blocks that share a class tile's rows
  int64_t feature_splits;  // blocks that share its weight gradient
};

template <class T>
struct ClassGradientParams {
  CudaHead head;
  CudaGradients out;  // writes weight and bias, and kappa where it has a value per class
  Saved<const T> saved;
  GradientRows<T> rows;
  Chunk chunk;
  GradientMatrix gradient;  // writes and reads it
  GradientSums<T> sums;     // writes and reads them
  ClassWork work;
  MatrixRef x;  // [N, D]  the features, in float16 their unit rows, as operand of dw
  bool with_sum;
};

template <class T>
cudaError_t launch_class_gradient(const ClassGradientParams<T>& p, const Plan& plan,
                                  cudaStream_t stream);

template <class T>
struct InputGradientParams {
  int64_t N, D;
  Chunk chunk;
  GradientMatrix gradient;
  MatrixRef weight;       // [chunk.count, D]  the chunk's weights, in float16 their unit rows
  PartialFeatures<T> dx;  // writes it, or adds to it after the first chunk
};

template <class T>
cudaError_t launch_input_gradient(const InputGradientParams<T>& p, const Plan& plan,
                                  cudaStream_t stream);

}  // namespace tvmf::sm80
