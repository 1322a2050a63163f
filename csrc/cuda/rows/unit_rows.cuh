// Copies of rows as unit rows (UnitRows): the operands of float16 products with the gradient.
#pragma once

#include "cuda/class_terms.cuh"
#include "cuda/views.h"

namespace tvmf::rows {

// Work items of a copy, each of 8 elements.
inline int64_t unit_items(const UnitRows& to, int64_t lines) {
  return to.data ? lines * (to.stride / 8) : 0;
}

// Work item i. `rnorm` is that of line 0.
template <class V>
__device__ __forceinline__ void copy_unit_row(const Operand<V>& from, const float* rnorm,
                                              const UnitRows& to, int64_t i) {
  const int64_t line = i / (to.stride / 8), d = i % (to.stride / 8) * 8;
  if (line >= from.lines) return;
  struct alignas(16) Run {
    V element[8];
  } run{};
  const V* at = from.data + line * from.line_stride + d * from.element_stride;
  if (from.vectors && d + 8 <= from.elements) {
    run = load_as<Run>(at);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (d + k < from.elements) run.element[k] = at[k * from.element_stride];
  }
  const float scale = unit_scale(rnorm[line]);
  struct alignas(16) Four {
    uint32_t pair[4];
  } out;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    out.pair[k] = pack_f16(to_number<float>(run.element[2 * k]) * scale,
                           to_number<float>(run.element[2 * k + 1]) * scale);
  store_as(static_cast<f16*>(to.data) + line * to.stride + d, out);
}

}  // namespace tvmf::rows
