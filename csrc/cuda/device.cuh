// Device functions that know nothing of the loss: access to tensors of any dtype, and sums over
// fragments, warps and blocks.
#pragma once

#include <type_traits>

#include "cuda/math.cuh"

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

// The threads that work together: here all of the block. Their number is a multiple of 32.
struct WholeBlock {
  static __device__ __forceinline__ int thread() { return threadIdx.x; }
  static __device__ __forceinline__ int threads() { return blockDim.x; }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
};

// Calls f with each of a vector's first `count` values. The team's threads share them, and each
// thread has four loads in flight.
template <class T, class Team = WholeBlock, class F>
__device__ __forceinline__ void for_values(const VectorRef& vector, int64_t count, const F& f) {
  const auto walk = [&](const auto* data, const auto& number) {
    const int64_t threads = Team::threads();
    for (int64_t first = Team::thread(); first < count; first += 4 * threads) {
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

// Two neighbouring elements of a row, as a lane of a fragment holds them.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

template <class X, class T>
__device__ __forceinline__ Pair<X> round_pair(T low, T high) {
  if constexpr (sizeof(X) >= 4)
    return {X(low), X(high)};
  else if constexpr (std::is_same_v<X, bf16>)
    return bits_as<Pair<X>>(pack_bf16(low, high));
  else
    return bits_as<Pair<X>>(pack_f16(low, high));
}

// Stores two neighbouring elements of a contiguous gradient at once, where `both` are inside it and
// aligned; otherwise only the first.
template <class T>
__device__ __forceinline__ void store_pair_at(const GradientRef& to, int64_t i, T low, T high,
                                              bool both) {
  if (!both) {
    store_at(to, i, low);
    return;
  }
  switch (to.dtype) {
    case DType::kFloat16:
      store_as(static_cast<f16*>(to.data) + i, round_pair<f16>(float(low), float(high)));
      break;
    case DType::kBFloat16:
      store_as(static_cast<bf16*>(to.data) + i, round_pair<bf16>(float(low), float(high)));
      break;
    case DType::kFloat32:
      store_as(static_cast<float*>(to.data) + i, Pair<float>{float(low), float(high)});
      break;
    default: store_as(static_cast<double*>(to.data) + i, Pair<double>{double(low), double(high)});
  }
}

template <class T>
__device__ __forceinline__ T infinity() {
  return T(__builtin_inf());
}
// A running maximum starts here. It is finite, so that subtracting it from a logit of -inf gives
// -inf and not NaN.
template <class T>
constexpr T kLowest = sizeof(T) == 4 ? T(-3.4028234663852886e38) : T(-1.7976931348623157e308);

__device__ __forceinline__ float exp_of(float v) { return fast_exp2(v * 1.4426950408889634f); }
__device__ __forceinline__ double exp_of(double v) { return exp(v); }

template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}

// The sum and the maximum over the four lanes that hold a row of a fragment.
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
// The sum over the eight lanes that hold a column of a fragment.
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

// The sum of one value of every thread of the block, in a fixed order. All threads get it. `smem`
// holds one T for each warp.
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

// Reduces kCount values of every thread of the team at once; all threads get the results. `smem`
// holds kCount T for each warp.
template <class Team, int kCount, class T, class F>
__device__ __forceinline__ void block_reduce(T (&v)[kCount], T* smem, const F& combine) {
  const int lane = Team::thread() % kWarp, warps = Team::threads() / kWarp;
  const auto over_warp = [&] {
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2)
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        v[k] = combine(v[k], __shfl_xor_sync(0xffffffff, v[k], mask));
  };
  over_warp();
  Team::sync();
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    if (lane == 0) smem[k * warps + Team::thread() / kWarp] = v[k];
  Team::sync();
#pragma unroll
  for (int k = 0; k < kCount; ++k) v[k] = lane < warps ? smem[k * warps + lane] : T(0);
  over_warp();
}
template <class Team = WholeBlock, int kCount, class T>
__device__ __forceinline__ void block_sums(T (&v)[kCount], T* smem) {
  block_reduce<Team>(v, smem, [](T a, T b) { return a + b; });
}
// The values must not be negative or NaN: threads without a value count as 0.
template <int kCount, class T>
__device__ __forceinline__ void block_maxima(T (&v)[kCount], T* smem) {
  block_reduce<WholeBlock>(v, smem, [](T a, T b) { return larger(a, b); });
}

// One thread of each of `blocks` blocks says that its block has written its part. True for the last
// of them, whose block may then read the parts of all. Barriers must order the block's writes
// before the call and its reads behind it. The counter is 0 before the launch.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, unsigned blocks) {
  __threadfence();
  const bool last = atomicAdd(counter, 1u) == blocks - 1;
  __threadfence();
  return last;
}

}  // namespace tvmf
