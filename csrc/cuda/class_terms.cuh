// The terms from which a product becomes a logit: cosine -> phi -> logit. Both passes compute a
// logit by these functions, and so get the same bits.
#pragma once

#include "cuda/device.cuh"
#include "loss.h"
#include "similarity.h"

namespace tvmf {

template <class T>
struct Scale {
  T value;
  T derivative;  // of the value by the number that the caller gives

  static __device__ __forceinline__ Scale of(const CudaHead& head) {
    const T s = value_at<T>(head.scale, 0);
    if (!head.softplus_scale) return {s, T(1)};
    // F.softplus is linear beyond 20.
    if (s > T(20)) return {s + 1, T(1)};
    return {log1p(exp(s)) + 1, T(1) / (1 + exp(-s))};
  }
};

// The terms of class y as the target of a row.
template <class T>
__device__ __forceinline__ TargetTerms target_terms(const CudaHead& head, int64_t y) {
  return {value_at<T>(head.kappa, y),
          value_at<T>(head.bias, y),
          value_at<T>(head.prior, y),
          Scale<T>::of(head).value,
          value_at<double>(head.cosine_margin, y),
          value_at<double>(head.angular_margin, y)};
}

__device__ __forceinline__ int64_t label_of(const CudaHead& head, int64_t n) {
  return label_of(head.target[n * head.target_stride], head.ignore_index, head.C,
                  head.target_score.data);
}

// The column of a label in a tile of classes, or -1 where it lies in another.
__device__ __forceinline__ int column_of(int64_t label, int64_t first_class, int classes) {
  const int64_t column = label - first_class;
  return column >= 0 && column < classes ? int(column) : -1;
}

// The inverse of a row's norm, by the sum of squares of the row times `scale`.
template <class T>
__device__ __forceinline__ T rnorm_of(T squares, T scale = 1) {
  const T norm = sqrt(squares) / scale;
  return 1 / (norm < T(kEps) ? T(kEps) : norm);
}

// float16 has a narrow range. Its products are made of unit rows: rows of x and of the weight times
// the power of two that brings their norm to about 2^8. `unit_scale` is that power, by the inverse
// of the row's norm, and `unit_rnorm` is the inverse of the unit row's norm. Small enough an
// element to be rounded as a subnormal number is 2^-22 of its row or less.
__device__ __forceinline__ float unit_scale(float rnorm) {
  return bits_as<float>(bits_as<uint32_t>(rnorm) & 0x7f800000) * 256.0f;
}
__device__ __forceinline__ float unit_rnorm(float rnorm) {
  return bits_as<float>((bits_as<uint32_t>(rnorm) & 0x807fffff) | 0x3b800000);
}

// The same for the kinds of product that need no unit rows as well.
template <Math kMath, class T>
__device__ __forceinline__ T inner_rnorm(T rnorm) {
  if constexpr (kMath == Math::kF16)
    return unit_rnorm(rnorm);
  else
    return rnorm;
}
// Whether the cosines are made of unit rows of the weight: where float32 is rounded to float16.
// Then prepare_rows makes their norms.
template <Math kMath, class W>
constexpr bool kUnitWeights = kMath == Math::kF16 && sizeof(W) == 4;
template <Math kMath, class W, class T>
__device__ __forceinline__ T operand_rnorm(T rnorm) {
  if constexpr (kUnitWeights<kMath, W>)
    return unit_rnorm(rnorm);
  else
    return rnorm;
}

// The logarithm of a sum of exponentials. On Hopper they are relative to the target's logit, so
// that the sum can leave float32's normal numbers, where nothing that is divided by it is exact.
// Such a sum counts as 0.
template <class T>
constexpr T kSmallestSum = sizeof(T) == 4 ? T(1e-37) : T(0);
template <class T>
__device__ __forceinline__ double log_of_sum(T sum_exp) {
  return sum_exp < kSmallestSum<T> ? -infinity<double>() : log(double(sum_exp));
}

// The terms of a class's logit, without its norm. Beyond the last class the logit is -inf and every
// other term is 0.
template <class T>
struct ClassValues {
  T kappa, bias, offset, omega;

  // The same for the backward pass, with the prior where the bias is. -inf becomes a number whose
  // exponential is 0 as well, because the logit itself is multiplied by the gradient.
  static __device__ __forceinline__ ClassValues of_gradient(const CudaHead& head, int64_t c,
                                                            T scale) {
    ClassValues terms = of(head, c, scale);
    const auto finite = [](T v) { return v < T(-1e30) ? T(-1e30) : v; };
    terms.bias = finite(c < head.C ? value_at<T>(head.prior, c) : T(0));
    terms.offset = finite(terms.offset);
    return terms;
  }

  static __device__ __forceinline__ ClassValues of(const CudaHead& head, int64_t c, T scale) {
    if (c >= head.C) return {T(0), T(0), -infinity<T>(), T(0)};
    const T bias = value_at<T>(head.bias, c);
    return {value_at<T>(head.kappa, c), bias, scale * bias + value_at<T>(head.prior, c),
            value_at<T>(head.class_weight, c)};
  }
};

// The terms of a tile's classes in shared memory. The forward pass sets the norms later than the
// other terms, when it has read the weights.
template <class T, int kCols>
struct ClassTile {
  T rnorm[kCols], kappa[kCols], bias[kCols], offset[kCols], omega[kCols];

  // A term of two successive classes, of which the first is even.
  static __device__ __forceinline__ Pair<T> pair(const T (&term)[kCols], int col) {
    return load_as<Pair<T>>(term + col);
  }
  __device__ __forceinline__ void set(int col, const ClassValues<T>& terms) {
    kappa[col] = terms.kappa, bias[col] = terms.bias;
    offset[col] = terms.offset, omega[col] = terms.omega;
  }
};

template <class T>
__device__ __forceinline__ T cosine_of(T product, T x_rnorm, T weight_rnorm) {
  return clamp_cosine(product * x_rnorm * weight_rnorm);
}

template <class T>
__device__ __forceinline__ T logit_of(T scale, T phi, T offset) {
  return multiply_add(scale, phi, offset);
}

}  // namespace tvmf
