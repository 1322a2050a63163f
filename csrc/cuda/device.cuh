// What becomes of a tile's products: cosine -> phi -> logit, then either online statistics of the
// rows or the gradient. Both directions compute a logit in the one way, to the same bits.
#pragma once

#include <type_traits>

#include "cuda/head.h"
#include "cuda/sm80/tile.cuh"
#include "similarity.h"

namespace tvmf {

template <class T>
__device__ __forceinline__ T value_at(const VectorRef& vector, int64_t i) {
  if (!vector.data) return T(vector.value);
  const int64_t at = i * vector.stride;
  switch (vector.dtype) {
    case DType::kFloat16: return T(to_float(static_cast<const f16*>(vector.data)[at]));
    case DType::kBFloat16: return T(to_float(static_cast<const bf16*>(vector.data)[at]));
    case DType::kFloat32: return T(static_cast<const float*>(vector.data)[at]);
    default: return T(static_cast<const double*>(vector.data)[at]);
  }
}

// Calls f with a vector's first `count` values, the block's threads sharing them out; the loads of
// four are under way together.
template <class T, class F>
__device__ __forceinline__ void for_values(const VectorRef& vector, int64_t count, const F& f) {
  const auto walk = [&](const auto* data, const auto& number) {
    const int64_t threads = blockDim.x;
    for (int64_t first = threadIdx.x; first < count; first += 4 * threads) {
      std::remove_cvref_t<decltype(*data)> values[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t i = first + k * threads;
        values[k] = data[(i < count ? i : first) * vector.stride];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (first + k * threads < count) f(number(values[k]));
    }
  };
  switch (vector.dtype) {
    case DType::kFloat16:
      walk(static_cast<const f16*>(vector.data), [](f16 v) { return T(to_float(v)); });
      break;
    case DType::kBFloat16:
      walk(static_cast<const bf16*>(vector.data), [](bf16 v) { return T(to_float(v)); });
      break;
    case DType::kFloat32:
      walk(static_cast<const float*>(vector.data), [](float v) { return T(v); });
      break;
    default: walk(static_cast<const double*>(vector.data), [](double v) { return T(v); });
  }
}

template <class T>
__device__ __forceinline__ void store_at(const GradientRef& gradient, int64_t i, T value) {
  switch (gradient.dtype) {
    case DType::kFloat16: static_cast<f16*>(gradient.data)[i] = to_f16(float(value)); break;
    case DType::kBFloat16: static_cast<bf16*>(gradient.data)[i] = to_bf16(float(value)); break;
    case DType::kFloat32: static_cast<float*>(gradient.data)[i] = float(value); break;
    default: static_cast<double*>(gradient.data)[i] = double(value);
  }
}

template <class T>
struct Scale {
  T value, derivative;  // of the scale by what is given

  static __device__ __forceinline__ Scale of(const CudaHead& head) {
    const T s = value_at<T>(head.scale, 0);
    if (!head.softplus_scale) return {s, T(1)};
    // F.softplus is linear beyond 20.
    if (s > T(20)) return {s + 1, T(1)};
    return {log1p(exp(s)) + 1, T(1) / (1 + exp(-s))};
  }
};

template <class T>
__device__ __forceinline__ T infinity() {
  return T(__builtin_inf());
}
// Where a running max starts: finite, so that the difference to a logit of -inf is one.
template <class T>
constexpr T kLowest = sizeof(T) == 4 ? T(-3.4028234663852886e38) : T(-1.7976931348623157e308);

__device__ __forceinline__ float exp_of(float v) { return fast_exp2(v * 1.4426950408889634f); }
__device__ __forceinline__ double exp_of(double v) { return exp(v); }

template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}

template <class T>
__device__ __forceinline__ T rnorm_of(T squares) {
  const T norm = sqrt(squares);
  return 1 / (norm < T(kEps) ? T(kEps) : norm);
}

// A class's terms but for its norm; beyond the last class the logit is -inf and else 0.
template <class T>
struct ClassValues {
  T kappa, bias, offset, omega;

  static __device__ __forceinline__ ClassValues of(const CudaHead& head, int64_t c, T scale) {
    if (c >= head.C) return {T(0), T(0), -infinity<T>(), T(0)};
    const T bias = value_at<T>(head.bias, c);
    return {value_at<T>(head.kappa, c), bias, scale * bias + value_at<T>(head.prior, c),
            value_at<T>(head.class_weight, c)};
  }
};

// The terms of a tile's classes in shared memory. Not all come at once: the forward pass has a norm
// only when it has read the weights.
template <class T, int kCols>
struct ClassTile {
  T rnorm[kCols], kappa[kCols], bias[kCols], offset[kCols], omega[kCols];

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

// Two neighbours of a row, as a lane holds them.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

// Sum and maximum over the four lanes that hold a fragment's row.
template <class T>
__device__ __forceinline__ T quad_sum(T v) {
  v += __shfl_xor_sync(0xffffffff, v, 1);
  return v + __shfl_xor_sync(0xffffffff, v, 2);
}
template <class T>
__device__ __forceinline__ T quad_max(T v) {
  v = larger(v, __shfl_xor_sync(0xffffffff, v, 1));
  return larger(v, __shfl_xor_sync(0xffffffff, v, 2));
}
// Over the eight lanes that hold a fragment's column.
template <class T>
__device__ __forceinline__ T group_sum(T v) {
  v += __shfl_xor_sync(0xffffffff, v, 4);
  v += __shfl_xor_sync(0xffffffff, v, 8);
  return v + __shfl_xor_sync(0xffffffff, v, 16);
}
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  return group_sum(quad_sum(v));
}

// The sum of a block's values in a fixed order, known to all threads; `smem` has one T a warp.
template <class T>
__device__ __forceinline__ T block_sum(T v, T* smem) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) smem[threadIdx.x / kWarp] = v;
  __syncthreads();
  T total = 0;
  for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) total += smem[warp];
  return total;
}

// Several values of every thread at once, by sum or the larger; `smem` has kCount T a warp.
template <int kCount, class T, class F>
__device__ __forceinline__ void block_reduce(T (&v)[kCount], T* smem, const F& combine) {
  const int lane = threadIdx.x % kWarp, warps = int(blockDim.x) / kWarp;
  const auto over_warp = [&] {
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2)
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        v[k] = combine(v[k], __shfl_xor_sync(0xffffffff, v[k], mask));
  };
  over_warp();
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    if (lane == 0) smem[k * warps + int(threadIdx.x) / kWarp] = v[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) v[k] = lane < warps ? smem[k * warps + lane] : T(0);
  over_warp();
}
template <int kCount, class T>
__device__ __forceinline__ void block_sums(T (&v)[kCount], T* smem) {
  block_reduce(v, smem, [](T a, T b) { return a + b; });
}
// Of what is not negative and no NaN.
template <int kCount, class T>
__device__ __forceinline__ void block_maxima(T (&v)[kCount], T* smem) {
  block_reduce(v, smem, [](T a, T b) { return larger(a, b); });
}

// What the forward pass knows of a tile's rows before their products.
template <class T, int kRows>
struct RowTile {
  T rnorm[kRows], target_product[kRows], target_score[kRows];
  int64_t label[kRows];  // -1: ignored, -2: names no class
};

// Statistics of the rows' logits so far; the first of the four lanes that share a row has them.
template <class T, int kRows>
struct StatisticTile {
  T max[kRows], sum_exp[kRows], sum[kRows];
  int rank[kRows];
};

}  // namespace tvmf
