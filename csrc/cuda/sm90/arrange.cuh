// 16-bit features in the order in which the lanes of Hopper's kernels read them, so that a lane's
// fragments are neighbours in shared memory. The kernels that prepare the rows write them.
#pragma once

#include "cuda/class_terms.cuh"

namespace tvmf::sm90 {

// Zeros beyond the last row and column. The pointers are null where no features are arranged.
struct ArrangedRows {
  int64_t rows, columns;  // multiples of 32 and of 64
  void* by_rows;          // [rows, columns]  rows, and columns unless `ordered`, by source_of:
                          // operand of the cosines
  void* by_columns;       // [N, columns]  columns by column_of: operand of the weight gradient
  const float* rnorm;     // [N]  not null where by_columns has unit rows
  bool ordered;           // whether by_rows keeps the order of the columns, as 16-bit weights do

  // Work items of `arrange`, each of 16 bytes, and of `arrange_by_columns`.
  int64_t items() const { return by_rows ? rows * (columns / 8) : 0; }
  __host__ __device__ int64_t column_items(int64_t N) const {
    return by_columns ? N * (columns / 8) : 0;
  }
};

// Position 8 t + 2 q + e of 32 holds column 8 q + 2 t + e: a lane's 8 successive weights are its
// operands of two instructions. Rows are arranged likewise, so that a lane's products belong to 8
// successive rows.
__host__ __device__ constexpr int source_of(int position) {
  return position % 8 / 2 * 8 + position / 8 * 2 + position % 2;
}

// Columns of the weight gradient: position 8 t + 2 q + e of 16 holds column 4 q + 2 t + e, so that
// a lane has 4 successive columns and four lanes have 64 bytes of float32.
__host__ __device__ constexpr int column_of(int position) {
  return position % 8 / 2 * 4 + position / 8 * 2 + position % 2;
}

// The elements column(0) to column(7) of a row of the features, and zeros beyond the matrix.
struct alignas(16) EightFeatures {
  uint16_t v[8];

  template <class Column>
  static __device__ __forceinline__ EightFeatures of(const CudaHead& head, int64_t n,
                                                     const Column& column) {
    const uint16_t* x = static_cast<const uint16_t*>(head.x.data);
    EightFeatures eight{};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int64_t d = column(k);
      if (n < head.N && d < head.D) eight.v[k] = x[n * head.x.row_stride + d * head.x.col_stride];
    }
    return eight;
  }
};

// 16 bytes of a row of by_columns, from column `col` on.
__device__ __forceinline__ void arrange_columns(const CudaHead& head, const ArrangedRows& to,
                                                int64_t row, int col) {
  auto eight =
      EightFeatures::of(head, row, [&](int k) { return col / 16 * 16 + column_of(col % 16 + k); });
  if (to.rnorm) {
    const float scale = unit_scale(to.rnorm[row]);
#pragma unroll
    for (uint16_t& each : eight.v)
      each = head.x.dtype == DType::kBFloat16 ? to_bf16(to_float(bf16{each}) * scale).bits
                                              : to_f16(to_float(f16{each}) * scale).bits;
  }
  store_as(static_cast<uint16_t*>(to.by_columns) + row * to.columns + col, eight);
}
__device__ __forceinline__ void arrange_by_columns(const CudaHead& head, const ArrangedRows& to,
                                                   int64_t i) {
  const int64_t row = i / (to.columns / 8);
  if (row < head.N) arrange_columns(head, to, row, int(i % (to.columns / 8)) * 8);
}

// Work item i: 16 bytes of each order, four pairs of neighbours.
__device__ __forceinline__ void arrange(const CudaHead& head, const ArrangedRows& to, int64_t i) {
  const int64_t row = i / (to.columns / 8);
  if (row >= to.rows) return;
  const int col = int(i % (to.columns / 8)) * 8;
  const uint16_t* x = static_cast<const uint16_t*>(head.x.data);
  const bool whole = to.ordered && head.x.col_stride == 1 && head.x.row_stride % 8 == 0 &&
                     reinterpret_cast<uintptr_t>(x) % 16 == 0 && col + 8 <= head.D;
  const int64_t source = row / 32 * 32 + source_of(int(row % 32));
  const auto ordered_or_not = [&](int k) {
    return to.ordered ? col + k : col / 32 * 32 + source_of(col % 32 + k);
  };
  store_as(static_cast<uint16_t*>(to.by_rows) + row * to.columns + col,
           !whole            ? EightFeatures::of(head, source, ordered_or_not)
           : source < head.N ? load_as<EightFeatures>(x + source * head.x.row_stride + col)
                             : EightFeatures{});
  if (to.by_columns && row < head.N) arrange_columns(head, to, row, col);
}

}  // namespace tvmf::sm90
