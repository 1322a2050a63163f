// t-vMF similarity (Kobayashi, CVPR 2021) and its derivatives, for all kernels.
//   phi(c) = (1 + c) / (1 + kappa (1 - c)) - 1 = (c - kappa u) / d
//   with u = 1 - c and d = 1 + kappa u. The last form is exactly c where kappa is 0.
// V is float, double, or a SIMD vector of either.
#pragma once

#ifdef __CUDACC__
#define TVMF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TVMF_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace tvmf {

// F.normalize's eps: a row shorter than this is divided by it instead of by its norm.
constexpr double kEps = 1e-12;

// Rounding pushes the cosine of parallel vectors past 1; NaN passes through.
template <class V>
TVMF_HOST_DEVICE V clamp_cosine(V cosine) {
  cosine = cosine > 1 ? V{} + 1 : cosine;
  return cosine < -1 ? V{} - 1 : cosine;
}

// a b + c. A GPU computes it in one instruction, with one rounding.
template <class V>
TVMF_HOST_DEVICE V multiply_add(V a, V b, V c) {
#ifdef __CUDA_ARCH__
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// 1 / v. On a GPU float32 uses the special-function unit, whose result may be one unit in the last
// place off, while a division would be at most half a unit off.
template <class V>
TVMF_HOST_DEVICE V reciprocal(V v) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == 4) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(v));
    return v;
  }
#endif
  return 1 / v;
}

template <class V>
struct Similarity {
  V phi, dphi_dcosine, dphi_dkappa;
};

// phi, with the same roundings as in similarity_with_gradient, so that both passes see the same
// logit.
template <class V>
TVMF_HOST_DEVICE V similarity(V cosine, V kappa) {
  const V u = 1 - cosine;
  return multiply_add(-kappa, u, cosine) * reciprocal(multiply_add(kappa, u, V{} + 1));
}

template <class V>
TVMF_HOST_DEVICE Similarity<V> similarity_with_gradient(V cosine, V kappa) {
  const V u = 1 - cosine;
  const V inv_d = reciprocal(multiply_add(kappa, u, V{} + 1));
  return {multiply_add(-kappa, u, cosine) * inv_d, (1 + 2 * kappa) * inv_d * inv_d,
          -(1 + cosine) * u * inv_d * inv_d};
}

}  // namespace tvmf
