// Products of our own, on matrices in panels: 16 columns that follow each other, [cols / 16, rows,
// 16], with zeros beyond the last column. An element has 32 bits. It is a float, or a pair of
// bfloat16 that follow each other in the direction of the sum.
#pragma once

#include <cstdint>

namespace tvmf::cpu {

constexpr int64_t kPanel = 16;

// The sum of a product is cut into pieces of so many elements, whose sums are added in order. A
// panel of such a piece stays in the first-level cache. Shorter pieces have smaller errors of
// rounding, which count in float32 alone: those of bfloat16's numbers are larger.
constexpr int64_t kFloatDepth = 128, kPairDepth = 256;

// out (+)= a b, or with a transposed. A distance is that of two panels, in elements.
struct PanelProduct {
  int64_t rows, panels;  // of out
  int64_t depth;         // elements that each sum runs over
  const float* a;        // [depth / 16, rows, 16], or transposed [rows / 16, depth, 16]
  int64_t a_distance;
  const float* b;  // [panels, depth, 16]
  int64_t b_distance;
  float* out;  // [panels, rows, 16], always float32
  int64_t out_distance;
  bool add;
};

// The products of one kind of element on one instruction set.
struct PanelKernels {
  int64_t per_element;  // numbers in an element
  void (*multiply)(const PanelProduct& product);
  void (*multiply_transposed)(const PanelProduct& product);
  // A row whose columns are summed over: element k goes to out[k / 16 * distance + k % 16].
  void (*pack_row)(const float* row, int64_t cols, float* out, int64_t distance);
  // `count` rows that are summed over, at most `per_element`: element k holds the numbers k of all
  // of them, and zeros for rows that are missing.
  void (*pack_rows)(const float* rows, int64_t row_stride, int64_t count, int64_t cols, float* out,
                    int64_t distance);
  // At most 16 rows as the columns of one panel: out[k, i] is element k of row i.
  void (*pack_columns)(const float* rows, int64_t row_stride, int64_t count, int64_t cols,
                       float* out);
  // One panel of numbers, [count, 16], as elements for both products of the backward pass: pairs of
  // columns, [count, 8] with rows 16 apart, and pairs of rows, [count / 2, 16]. Null for floats,
  // which need no conversion.
  void (*pack_pairs)(const float* panel, int64_t count, float* of_columns, float* of_rows);
};

}  // namespace tvmf::cpu
