// Element types and rounding of each kind of product (Math), shared by all architectures.
#pragma once

#include "cuda/cost.h"
#include "cuda/head.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/shared.cuh"

namespace tvmf {

constexpr int kWarp = 32;

// X: the features' element type. Acc: the type of sums, norms and statistics.
template <Math kMath>
struct MathTraits;
template <>
struct MathTraits<Math::kBf16> {
  using X = bf16;
  using Acc = float;
};
template <>
struct MathTraits<Math::kF16> {
  using X = f16;
  using Acc = float;
};
template <>
struct MathTraits<Math::kTf32> {
  using X = float;
  using Acc = float;
};
// float32 products use fused multiply-adds and not 3xTF32, for two reasons. How tensor cores round
// sums is not documented and cannot be emulated. And three TF32 products, at the 60 % of the peak
// rate that products reach, are at most 1.5 times as fast as fused multiply-adds.
template <>
struct MathTraits<Math::kF32> {
  using X = float;
  using Acc = float;
};
template <>
struct MathTraits<Math::kF64> {
  using X = double;
  using Acc = double;
};

template <Math kMath>
constexpr bool kTensorCores = kMath != Math::kF32 && kMath != Math::kF64;

template <Math kMath>
struct MathConstant {
  static constexpr Math value = kMath;
};

// Calls f with the kind of product and the element type in which the kernels read the weight.
template <class F>
cudaError_t with_math(Math math, DType weight, const F& f) {
  const bool wide = weight == DType::kFloat32;
  switch (math) {
    case Math::kBf16:
      return wide ? f(MathConstant<Math::kBf16>{}, float{})
                  : f(MathConstant<Math::kBf16>{}, bf16{});
    case Math::kF16:
      return wide ? f(MathConstant<Math::kF16>{}, float{}) : f(MathConstant<Math::kF16>{}, f16{});
    case Math::kTf32: return f(MathConstant<Math::kTf32>{}, float{});
    case Math::kF32: return f(MathConstant<Math::kF32>{}, float{});
    default: return f(MathConstant<Math::kF64>{}, double{});
  }
}

// The same for the kinds of product whose sums are T, which a function templated on T can have.
template <class T, class F>
cudaError_t with_math_of(Math math, DType weight, const F& f) {
  return with_math(math, weight, [&](auto kind, auto element) {
    if constexpr (std::is_same_v<typename MathTraits<decltype(kind)::value>::Acc, T>)
      return f(kind, element);
    else
      return cudaErrorInvalidValue;
  });
}

template <class Acc, class T>
__device__ __forceinline__ Acc to_number(T value) {
  if constexpr (sizeof(T) == 2)
    return to_float(value);
  else
    return value;
}

// A number as the products see it. Norms are those of the rounded vectors: then rounding turns a
// vector but does not stretch it, and a cosine near 1, where phi is steepest, has the least error.
template <Math kMath, class Acc>
__device__ __forceinline__ Acc as_operand(Acc value) {
  if constexpr (kMath == Math::kBf16)
    return to_float(to_bf16(value));
  else if constexpr (kMath == Math::kF16)
    return to_float(to_f16(value));
  else if constexpr (kMath == Math::kTf32)
    return bits_as<float>(to_tf32(bits_as<uint32_t>(value)));
  else
    return value;
}

template <Math kMath>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (kMath == Math::kBf16)
    return pack_bf16(low, high);
  else
    return pack_f16(low, high);
}

// A matrix in global memory that the kernels multiply. Elements beyond its extent read as 0.
template <class T>
struct Operand {
  const T* data;
  int64_t line_stride, element_stride;  // in elements
  int64_t lines, elements;              // extent
  bool vectors;                         // 16-byte loads: aligned lines of contiguous elements

  static __device__ __forceinline__ Operand of(const void* data, int64_t line_stride,
                                               int64_t element_stride, int64_t lines,
                                               int64_t elements) {
    const bool vectors = element_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                         line_stride * int64_t(sizeof(T)) % 16 == 0 && line_stride >= 0;
    return {static_cast<const T*>(data), line_stride, element_stride, lines, elements, vectors};
  }
  static __device__ __forceinline__ Operand of(const MatrixRef& matrix, int64_t lines,
                                               int64_t elements) {
    return of(matrix.data, matrix.row_stride, matrix.col_stride, lines, elements);
  }
};

}  // namespace tvmf
