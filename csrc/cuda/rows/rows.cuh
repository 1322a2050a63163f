// The O(N) kernels around the products, shared by all architectures: each prepares or finishes
// something for every row. Every function starts one kernel.
#pragma once

#include "cuda/rows/workspace.h"
#include "cuda/sm90/arrange.cuh"
#include "cuda/views.h"

namespace tvmf::rows {

using sm90::ArrangedRows;

template <class T>
struct PrepareParams {
  CudaHead head;
  Saved<T> saved;         // writes x_rnorm, target_cosine and target_logit, and weight_rnorm where
                          // float32 weights are rounded to float16
  RowTargets<T> targets;  // writes both
  ArrangedRows arranged;  // writes it, where it is not null
  unsigned* finished;     // []  sets it to 0 for FinishParams
};

// Norms of the rows, and of each row's target: label, cosine, score and logit.
template <class T>
cudaError_t launch_prepare(const PrepareParams<T>& p, Math math, cudaStream_t stream);

template <class T>
struct FinishParams {
  CudaHead head;
  LossOptions options;
  CudaStatistics out;
  Saved<T> saved;  // writes max and sum_exp
  RowTargets<T> targets;
  PartialStatistics<T> partial;
  int64_t block_rows;               // rows of a block
  int64_t first_block, all_blocks;  // of the launch, and of the pass
  double* totals;                   // [all_blocks, 2]  sums of the losses and of their weights
  unsigned* finished;               // []  counts the blocks that have written their totals
};

// Merges the partial statistics of each row in order, and makes the statistics or the loss. A
// reduced loss is made by the launch that has the last blocks.
template <class T>
cudaError_t launch_finish(const FinishParams<T>& p, cudaStream_t stream);

template <class T>
struct PrepareGradientParams {
  CudaHead head;
  LossOptions options;
  CudaUpstream upstream;
  Saved<const T> saved;
  GradientRows<T> gradient;  // writes it
  ArrangedRows arranged;     // writes it, where it is not null
  UnitRows unit_x;           // writes them, where they are not null
  RowSegment segment;        // adds to scale_rest after the first one
  bool with_sum;
  bool float16;  // whether gradient tiles are float16, so that they need a loss scale
};

// The part of each row in the gradients of all classes, and the loss scale.
template <class T>
cudaError_t launch_prepare_gradient(const PrepareGradientParams<T>& p, cudaStream_t stream);

template <class T>
struct FinishGradientParams {
  CudaHead head;
  CudaGradients out;  // writes x and scale, and kappa where it is one for all classes
  Saved<const T> saved;
  const T* inv_loss_scale;   // [1]
  const double* scale_rest;  // []
  GradientSums<T> sums;
  int64_t row_dots, totals;  // slots of sums.row_dot and of sums.totals
  PartialFeatures<const T> dx;
  bool unit_rows;  // whether dx was made of unit rows of x
};

// Adds up the partial gradients of the features in order and projects them; finishes the scalars.
template <class T>
cudaError_t launch_finish_gradient(const FinishGradientParams<T>& p, cudaStream_t stream);

struct UnitRowsParams {
  MatrixRef from;      // [lines, elements]  float16, or float32 to be rounded to it
  const float* rnorm;  // [lines]
  UnitRows to;         // writes it
  int64_t lines, elements;
};

// Copies rows as unit rows.
cudaError_t launch_unit_rows(const UnitRowsParams& p, cudaStream_t stream);

}  // namespace tvmf::rows
