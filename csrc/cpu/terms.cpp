#include "cpu/terms.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "torch/check.h"

namespace tvmf::cpu {
namespace {

template <class T>
constexpr const char* kIn = sizeof(T) == 4 ? " in float32" : " in float64";

// The logarithm of 7e10. Classes of that size do not occur; a larger prior is a class size.
constexpr double kLargestLogCount = 25;

}  // namespace

template <class T>
HeadTerms<T>::HeadTerms(const Head& head)
    : kappa(head.kappa, head.kappa_value),
      bias(head.bias, 0),
      prior(head.prior, 0),
      class_weight(head.class_weight, 1),
      cosine_margin(head.cosine_margin, head.cosine_margin_value),
      angular_margin(head.angular_margin, head.angular_margin_value) {
  check_margins();
  if (head.prior)
    for (int64_t c = 0; c < prior.size(); ++c)
      TVMF_CHECK(!(prior[c] > kLargestLogCount),
                 "prior must be the logarithms of class frequencies, which "
                 "tvmf_ext.margin.log_prior(counts) makes, got ",
                 prior[c], " for class ", c);
  scale = PerClass<T>(head.scale, head.scale_value)[0];
  if (head.softplus_scale) {
    scale_derivative = T(1) / (T(1) + std::exp(-scale));
    scale = std::max(scale, T(0)) + std::log1p(std::exp(-std::abs(scale))) + T(1);
  }
  if (scale <= 0) fail("scale must be > 0, got ", scale, kIn<T>);
}

template <class T>
void HeadTerms<T>::check_margins() const {
  const auto of_class = [](int64_t c, int64_t size) {
    return size > 1 ? " for class " + std::to_string(c) : "";
  };
  const int64_t margins = std::max(cosine_margin.size(), angular_margin.size());
  const int64_t size = std::max(kappa.size(), margins);
  for (int64_t c = 0; c < size; ++c) {
    const double m = cosine_margin[c], a = angular_margin[c];
    TVMF_CHECK(m >= 0 && std::isfinite(m), "cosine_margin must be finite and >= 0, got ", m,
               of_class(c, cosine_margin.size()));
    TVMF_CHECK(a >= 0 && a <= kLargestAngle, "angular_margin must be in [0, pi], got ", a,
               of_class(c, angular_margin.size()));
    TVMF_CHECK(!(kappa[c] <= T(-0.5)), "kappa must be > -1/2, got ", kappa[c],
               of_class(c, kappa.size()), kIn<T>);
    TVMF_CHECK(!(m > 0 || a > 0) || !(kappa[c] <= smallest_kappa(m, a)), "kappa must be > ",
               smallest_kappa(m, a), " with these margins, got ", kappa[c], of_class(c, size));
  }
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
