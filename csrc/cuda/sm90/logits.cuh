// Logits from products, in a form that takes few instructions and holds for every kappa:
//   v = (1 - c) / 2, in [0, 1]     d = 1 + 2 kappa v     phi = 1 - 2 (1 + 2 kappa) v / d
//   log2(e) (scale phi - reference) = slope v / d + start
// v is made of the product by one rounding where c is near 1 and phi is steepest.
#pragma once

#include "cuda/class_terms.cuh"
#include "cuda/sm90/kernels.h"

namespace tvmf::sm90 {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Calls f with the kind of a kernel's instance. With 16-bit weights those with a prior do not
// exist, which would make the library larger, and those with everything serve.
template <class Shape, class F>
cudaError_t with_terms(Terms terms, const F& f) {
  if (terms == Terms::kPlain) return f(std::integral_constant<Terms, Terms::kPlain>{});
  if constexpr (!Shape::kNarrow)
    if (terms == Terms::kPrior) return f(std::integral_constant<Terms, Terms::kPrior>{});
  return f(std::integral_constant<Terms, Terms::kAll>{});
}

// Whether the cosines are made of unit rows of the weight, and the inverse norm of its row there.
template <Math kMath, class Shape>
constexpr bool kUnitRows = kMath == Math::kF16 && !Shape::kNarrow;
template <Math kMath, class Shape>
__device__ __forceinline__ float cosine_rnorm(float rnorm) {
  return kUnitRows<kMath, Shape> ? unit_rnorm(rnorm) : rnorm;
}

// Above the upper bound phi no longer changes in float32. Below the lower one it differs from phi
// at the bound by less than 1e-6, except where c is near -1. Within the bounds no term of the form
// overflows or becomes 0.
__device__ __forceinline__ float bounded_kappa(float kappa) {
  return kappa < -0.4999995f ? -0.4999995f : kappa > 1e18f ? 1e18f : kappa;
}

// A class's terms of the form. `unit` is a factor that d may have, which slope v / d does not show.
struct ClassForm {
  float minus_rnorm, kappa, unit, slope;

  // The logits of a class beyond the last one are so low that their exponentials are 0. Those of a
  // class that has no finite norm are NaN.
  static __device__ __forceinline__ ClassForm of(float kappa, float rnorm, float unit, float scale,
                                                 bool inside) {
    const float slope = -2 * (1 + 2 * kappa) * scale * kLog2E * unit;
    return {-rnorm, 2 * kappa * unit, unit,
            !inside     ? -1e36f
            : rnorm > 0 ? slope
                        : bits_as<float>(0x7fffffff)};
  }
};

// Half the inverse norm of a row, or NaN where it has no finite norm.
__device__ __forceinline__ float half_rnorm_of(float rnorm) {
  return rnorm > 0 ? rnorm / 2 : bits_as<float>(0x7fffffff);
}

// The row's term of the form. It is finite but for rows that have no finite norm, whose logits must
// be NaN: v is not, because the instruction that clamps it makes 0 of NaN.
__device__ __forceinline__ float start_of(float scale, float reference, float half_rnorm) {
  const float start = kLog2E * (scale - reference);
  return (start > 1e30f ? 1e30f : start < -1e30f ? -1e30f : start) + 0 * half_rnorm;
}

// The terms of an element that depend on its row and its class, for a lane's two classes.
struct PairForm {
  float scaled[2];  // the product times half_rnorm
  float v[2], inv_d[2];

  // kShared: one reciprocal serves both classes. It may differ in its last bit from that of an
  // equal class, which must not be where classes are ranked.
  template <bool kShared>
  static __device__ __forceinline__ PairForm of(const ClassForm (&classes)[2], float half_rnorm,
                                                float product_0, float product_1) {
    PairForm pair{{product_0 * half_rnorm, product_1 * half_rnorm}, {}, {}};
    float d[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      pair.v[h] = multiply_add_unit(pair.scaled[h], classes[h].minus_rnorm, 0.5f);
      d[h] = fma(classes[h].kappa, pair.v[h], classes[h].unit);
    }
    if constexpr (kShared) {
      const float both = reciprocal(d[0] * d[1]);
      pair.inv_d[0] = both * d[1], pair.inv_d[1] = both * d[0];
    } else {
      pair.inv_d[0] = reciprocal(d[0]), pair.inv_d[1] = reciprocal(d[1]);
    }
    return pair;
  }
};

// phi of a target as the tiles compute that of a class, so that equal classes tie in rank.
__device__ __forceinline__ float phi_of(float quotient, float twice_kappa) {
  return fma(quotient, -2 * (1 + twice_kappa), 1.0f);
}
__device__ __forceinline__ float target_phi(float product, float x_rnorm, float weight_rnorm,
                                            float kappa) {
  const ClassForm form = ClassForm::of(bounded_kappa(kappa), weight_rnorm, 1, 1, true);
  const PairForm pair = PairForm::of<false>({form, form}, half_rnorm_of(x_rnorm), product, product);
  return phi_of(pair.v[0] * pair.inv_d[0], form.kappa);
}

}  // namespace tvmf::sm90
