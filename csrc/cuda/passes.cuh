// What the kernels of a pass are given, and what both directions know of a row or class of zeros.
#pragma once

#include "cuda/device.cuh"

namespace tvmf {

// 16-bit features as the operands of Hopper's products (csrc/mainloop_sm90.cuh), zeros beyond the
// last. Null where they are not wanted.
struct ArrangedRows {
  int64_t rows, columns;  // rows: a multiple of 32, columns: of 64
  void* by_rows;          // [rows, columns]  rows and columns by source_of: the cosines' operand
  void* by_columns;       // [N, columns]  columns by column_of: the weight gradient's operand

  int64_t chunks() const { return by_rows ? rows * (columns / 8) : 0; }
};

// Position 8 t + 2 q + e of 32 holds column 8 q + 2 t + e: a lane's 8 successive weights are what
// it multiplies in two instructions. Rows likewise, so that a lane's products are of 8 successive
// rows.
__host__ __device__ constexpr int source_of(int position) {
  return position % 8 / 2 * 8 + position / 8 * 2 + position % 2;
}
// The weight gradient's columns: a lane has 4 successive ones, four lanes 64 bytes of float32.
// Position 8 t + 2 q + e of 16 holds column 4 q + 2 t + e.
__host__ __device__ constexpr int column_of(int position) {
  return position % 8 / 2 * 4 + position / 8 * 2 + position % 2;
}

// Chunk i: 16 bytes, four pairs of neighbours.
__device__ __forceinline__ void arrange(const CudaHead& head, const ArrangedRows& to, int64_t i) {
  const int64_t row = i / (to.columns / 8);
  if (row >= to.rows) return;
  const int col = int(i % (to.columns / 8)) * 8;
  const uint16_t* x = static_cast<const uint16_t*>(head.x.data);
  struct alignas(16) Eight {
    uint16_t v[8];
  };
  const auto eight_of = [&](int64_t n, const auto& column) {
    Eight eight{};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int64_t d = column(k);
      if (n < head.N && d < head.D) eight.v[k] = x[n * head.x.row_stride + d * head.x.col_stride];
    }
    return eight;
  };
  store_as(static_cast<uint16_t*>(to.by_rows) + row * to.columns + col,
           eight_of(row / 32 * 32 + source_of(int(row % 32)),
                    [&](int k) { return col / 32 * 32 + source_of(col % 32 + k); }));
  if (to.by_columns && row < head.N)
    store_as(static_cast<uint16_t*>(to.by_columns) + row * to.columns + col,
             eight_of(row, [&](int k) { return col / 16 * 16 + column_of(col % 16 + k); }));
}

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

  int64_t* label;     // [N]  -1: ignored, -2: names no class
  T* target_score;    // [N]  phi + bias of the target
  T* target;          // [N]  logit of the target
  T* max;             // [splits, N]
  T* sum_exp;         // [splits, N]
  T* sum;             // [splits, N], or null
  int* rank;          // [splits, N]
  bool target_apart;  // sum_exp is without the target's
  ArrangedRows arranged;
  int64_t finish_rows;  // rows that a block of finish_rows has
  double* totals;       // [blocks of finish_rows, 2]  sums of losses and of their weights
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
  void* grad;            // [N, chunk] X  t_nc r_n q_c gain; on Hopper [chunk, grad_stride]
  T* row_dot;            // [dot_slots, N]  sum_c t c of each warp's classes, over all chunks
  T* col_sums;           // [slots, 3, chunk]  sum_n of t c, g, g dphi/dkappa
  T* dx;                 // [input_splits, N, D]  over all chunks
  double* totals;        // [total_count, 2]  sum g (phi + bias), sum g dphi/dkappa, over all chunks
  int64_t dot_slots;
  ArrangedRows arranged;
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
