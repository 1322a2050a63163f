// One call of an operator: its sizes, plan, terms and labels, in the compute dtype T, and the steps
// that both passes take.
#pragma once

#include <vector>

#include "cpu/blocks.h"
#include "cpu/choice.h"
#include "cpu/plan.h"
#include "cpu/product.h"
#include "cpu/terms.h"

namespace tvmf::cpu {

template <class T>
struct Call {
  // Throws std::out_of_range for a label that names no class, and what HeadTerms throws.
  explicit Call(const Head& head);

  const Head& head;
  int64_t N, C, D;
  const PanelKernels* own_products;  // null where the library's products serve
  CpuPlan plan;                      // for these
  HeadTerms<T> terms;
  std::vector<int64_t> label;  // [N]  the class of a row, kIgnored or kElsewhere
};

// The column of each row's target in the block, or -1 where it is in another.
void block_columns(const std::vector<int64_t>& label, const Block& block, int64_t* column);

// product[n, i] = <x_n, w_i> for the block's classes, and 0 in the padding.
template <class T>
void block_product(const Matrix<T>& x, const Matrix<T>& weight, const Block& block, T* product);

// out[i] = 1 / max(|rows_i|, eps)
template <class T>
void rnorm(const Matrix<T>& rows, T* out);

}  // namespace tvmf::cpu
