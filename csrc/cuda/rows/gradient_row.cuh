// Access to a GradientRow, and the treatment of rows and classes of zeros in both directions.
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

// A row or class of zeros has an rnorm of 1e12, which float16 cannot hold. Its elements are 0, so
// any factor will do inside the products, and the true one is applied to their sums.
template <class T>
__device__ __forceinline__ T inner_rnorm(T rnorm, bool float16) {
  return float16 && rnorm > T(0.5 / kEps) ? T(1) : rnorm;
}

// The factor of the sums of a gradient's products: the inverse of the loss scale, and the rnorm
// where inner_rnorm left it out of the products.
template <class T>
__device__ __forceinline__ T outer_factor(T inv_loss_scale, T rnorm, bool float16) {
  return inv_loss_scale * (inner_rnorm(rnorm, float16) == rnorm ? T(1) : rnorm);
}

// The factor of the projection, which a row or class of zeros does not have.
template <class T>
__device__ __forceinline__ T projection(T dot, T rnorm) {
  return rnorm < T(1 / kEps) ? dot * rnorm * rnorm : T(0);
}

}  // namespace tvmf
