// Hopper's kernels, which multiply: their parameters and their launches.
#pragma once

#include "cuda/rows/rows.cuh"
#include "cuda/sm90/plan.h"
#include "cuda/sm90/schedule.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/views.h"

namespace tvmf::sm90 {

// The operands of a product, as tensor copies read them.
struct TensorMaps {
  TensorMap a, b;
};

// The tiles of a kernel of cosines. Its grid has row_blocks * blocks persistent blocks.
struct CosineTiles {
  int class_tiles, row_blocks;
  int blocks;  // persistent blocks that share the class tiles of a block of rows
};

// What the kernels of cosines have beside scale phi: nothing, a prior in the logits, or all that
// there is: biases and a prior, sums, ranks, and the gradients of biases and kappa.
enum class Terms { kPlain, kPrior, kAll };

// The chunk's weights in the features' dtype.
struct RoundedWeights {
  uint16_t* data;  // [chunk.size, stride]
  int64_t stride;  // a multiple of 8
  bool unit_rows;  // whether they are unit rows
};

// What the forward pass keeps, or null pointers (KeptLayout).
struct KeptTensors {
  float* product;  // [C, stride], in the order of kept_half
  int64_t stride;  // N, rounded up to 32
  // The weights as the products rounded them: unit rows in float16, where the norms are known
  // before. Null where the weight itself is the operand.
  RoundedWeights weight;
};

struct StatisticsParams {
  TensorMaps maps;  // weight, arranged features
  CudaHead head;
  Saved<float> saved;  // writes weight_rnorm, unless prepare_rows has
  RowTargets<float> targets;
  PartialStatistics<float> partial;  // writes it
  CosineTiles tiles;
  // Where the last block merges the rows, which only a kernel of small tiles can.
  bool merges_rows;
  unsigned* finished;  // []  counts the blocks that have written their statistics
  LossOptions options;
  CudaStatistics out;
  KeptTensors kept;  // writes them, where they are not null, which only a kernel of small tiles can
};

cudaError_t launch_statistics(const StatisticsParams& p, const Plan& plan, Terms terms,
                              cudaStream_t stream);

// The chunk's gradients with respect to the cosines, as the products read them: element [c, n] is
// t_nc r_n q_c times the loss scale, with the q_c of unit rows where the weights are unit rows, and
// with the r_n of unit rows in float16 and where products were kept.
struct ClassMajorGradient {
  uint16_t* data;  // [chunk.size, stride] of the features' dtype
  int64_t stride;  // N, rounded up to 8
};

// Sums of each class over the rows: of t c, and of g and g dphi/dkappa times the scale.
struct ColumnSums {
  const float* data;  // [slots, 3, chunk.size]
  int slots;
};

struct GradientParams {
  TensorMaps maps;  // weight, arranged features
  CudaHead head;
  Saved<const float> saved;
  GradientRows<float> rows;
  Chunk chunk;
  ClassMajorGradient gradient;  // writes it
  RoundedWeights weight;        // writes it
  GradientSums<float> sums;     // writes them, or adds to them after the first chunk
  CosineTiles tiles;
  Terms terms;
};

cudaError_t launch_gradient(const GradientParams& p, const Plan& plan, cudaStream_t stream);

// Gradient tiles of products that were kept, of all classes at once.
struct KeptGradientParams {
  // Its rows are not written, but arranged.by_columns is where it is not null, and by the first
  // block scale_rest and the loss scale.
  rows::PrepareGradientParams<float> rows;
  const float* product;  // [C, product_stride], as KeptTensors has it
  int64_t product_stride;
  ClassMajorGradient gradient;  // writes it
  GradientSums<float> sums;     // writes them; a block has a slot of the totals
  int64_t column_stride;        // classes of a slot of sums.columns
  KeptTiles tiles;
  Terms terms;
};

cudaError_t launch_kept_gradient(const KeptGradientParams& p, Math math, cudaStream_t stream);

// The two products of a chunk: that with the features gives dw, that with the weights dx.
struct ProductsParams {
  TensorMaps weight_maps;   // gradient, features arranged by columns
  TensorMaps feature_maps;  // gradient, rounded weights
  CudaHead head;
  CudaGradients out;   // writes weight and bias, and kappa where it has a value per class
  bool class_outputs;  // whether any of these is wanted
  Saved<const float> saved;
  const float* inv_loss_scale;  // [1]
  Chunk chunk;
  RoundedWeights weight;
  ColumnSums sums;
  PartialFeatures<float> dx;  // writes it, or adds to it, unless it is null
  ProductSchedule schedule;
  bool add;  // whether an earlier segment of rows has written the gradients of out, in float32
};

cudaError_t launch_products(const ProductsParams& p, const Plan& plan, cudaStream_t stream);

}  // namespace tvmf::sm90
