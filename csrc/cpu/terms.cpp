#include "cpu/terms.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "torch/check.h"

namespace tvmf::cpu {
namespace {

template <class T>
constexpr const char* kIn = sizeof(T) == 4 ? " in float32" : " in float64";

}  // namespace

template <class T>
HeadTerms<T>::HeadTerms(const Head& head)
    : kappa(head.kappa, head.kappa_value),
      bias(head.bias, 0),
      prior(head.prior, 0),
      class_weight(head.class_weight, 1) {
  for (int64_t c = 0; c < kappa.size(); ++c)
    if (kappa[c] <= T(-0.5))
      fail("kappa must be > -1/2, got ", kappa[c],
           kappa.size() > 1 ? " for class " + std::to_string(c) : "", kIn<T>);
  scale = PerClass<T>(head.scale, head.scale_value)[0];
  if (head.softplus_scale) {
    scale_derivative = T(1) / (T(1) + std::exp(-scale));
    scale = std::max(scale, T(0)) + std::log1p(std::exp(-std::abs(scale))) + T(1);
  }
  if (scale <= 0) fail("scale must be > 0, got ", scale, kIn<T>);
}

template <class T>
BlockTerms<T>::BlockTerms(const HeadTerms<T>& terms, int64_t width, bool with_class_weight)
    : terms_(terms), width_(width), with_class_weight_(with_class_weight), values_(5 * width) {}

template <class T>
ClassTerms<T> BlockTerms<T>::fill(int64_t begin, int64_t count, int64_t stride,
                                  const T* weight_rnorm) {
  T *rnorm = values_.data(), *kappa = rnorm + width_, *bias = kappa + width_,
    *offset = bias + width_, *class_weight = offset + width_;
  const T scale = terms_.scale;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = begin + i;
    rnorm[i] = weight_rnorm[c];
    kappa[i] = terms_.kappa[c];
    bias[i] = terms_.bias[c];
    offset[i] = scale * bias[i] + terms_.prior[c];
    class_weight[i] = terms_.class_weight[c];
  }
  for (int64_t i = count; i < stride; ++i) {
    rnorm[i] = kappa[i] = bias[i] = class_weight[i] = 0;
    offset[i] = -std::numeric_limits<T>::infinity();
  }
  return {.weight_rnorm = rnorm,
          .kappa = kappa,
          .bias = bias,
          .offset = offset,
          .class_weight = with_class_weight_ ? class_weight : nullptr};
}

template struct HeadTerms<float>;
template struct HeadTerms<double>;
template class BlockTerms<float>;
template class BlockTerms<double>;

}  // namespace tvmf::cpu
