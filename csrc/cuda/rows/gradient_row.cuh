// Access to a GradientRow, and the factors of gradients outside their products.
#pragma once

#include "cuda/class_terms.cuh"
#include "cuda/views.h"

namespace tvmf {

template <class Row>
__device__ __forceinline__ void store_parts(Row* to, const Row& row) {
  struct Parts {
    Bytes16 part[sizeof(Row) / 16];
  };
  const auto parts = bits_as<Parts>(row);
#pragma unroll
  for (int i = 0; i < int(sizeof(Parts) / 16); ++i)
    reinterpret_cast<Bytes16*>(to)[i] = parts.part[i];
}

// The factor of the sums of a gradient's products: the inverse of the loss scale, and where they
// were made of unit rows the scale of the row.
template <class T>
__device__ __forceinline__ T outer_factor(T inv_loss_scale, T rnorm, bool unit_rows) {
  return unit_rows ? inv_loss_scale * T(unit_scale(float(rnorm))) : inv_loss_scale;
}

// The factor of the projection, which a row or class of zeros does not have.
template <class T>
__device__ __forceinline__ T projection(T dot, T rnorm) {
  return rnorm < T(1 / kEps) ? dot * rnorm * rnorm : T(0);
}

}  // namespace tvmf
