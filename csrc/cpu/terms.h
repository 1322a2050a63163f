// The arguments of a call in the compute dtype: class terms, labels and sizes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/plan.h"
#include "cpu/tensor.h"
#include "cpu/tile.h"

namespace tvmf {

// One value per class or one for all, in the compute dtype.
template <class T>
class PerClass {
 public:
  PerClass(const std::optional<Tensor>& tensor, double value) : value_(T(value)) {
    if (!tensor) return;
    tensor_ = to_dtype(*tensor, kDtype<T>);
    values_ = data<T>(*tensor_);
    size_ = tensor_->numel();
    stride_ = size_ > 1 ? tensor_->stride(0) : 0;
  }
  PerClass(const PerClass&) = delete;

  T operator[](int64_t c) const { return values_[c * stride_]; }
  int64_t size() const { return size_; }

 private:
  T value_;
  std::optional<Tensor> tensor_;
  const T* values_ = &value_;
  int64_t stride_ = 0, size_ = 1;
};

template <class T>
struct Terms {
  explicit Terms(const Head& head)
      : kappa(head.kappa, head.kappa_value),
        bias(head.bias, 0),
        prior(head.prior, 0),
        omega(head.class_weight, 1) {
    for (int64_t c = 0; c < kappa.size(); ++c)
      if (kappa[c] <= T(-0.5))
        refuse("kappa must be > -1/2", kappa[c],
               kappa.size() > 1 ? " for class " + std::to_string(c) : "");
    scale = PerClass<T>(head.scale, head.scale_value)[0];
    if (head.softplus_scale) {
      dscale = T(1) / (T(1) + std::exp(-scale));
      scale = std::max(scale, T(0)) + std::log1p(std::exp(-std::abs(scale))) + T(1);
    }
    if (scale <= 0) refuse("scale must be > 0", scale, "");
  }
  PerClass<T> kappa, bias, prior, omega;
  T scale;
  T dscale = 1;  // derivative of the scale by the number that the caller gives

 private:
  [[noreturn]] static void refuse(const char* wanted, T got, const std::string& where) {
    std::ostringstream text;
    text << wanted << ", got " << got << where << " in "
         << (sizeof(T) == 4 ? "float32" : "float64");
    throw std::invalid_argument(text.str());
  }
};

// The class terms of one block, padded to whole vectors.
template <class T>
class BlockTerms {
 public:
  BlockTerms(const Terms<T>& terms, int64_t width, bool with_omega)
      : terms_(terms), width_(width), with_omega_(with_omega), values_(5 * width) {}

  ClassTerms<T> fill(int64_t begin, int64_t count, int64_t ld, const T* weight_rnorm) {
    T *rnorm = values_.data(), *kappa = rnorm + width_, *bias = kappa + width_,
      *offset = bias + width_, *omega = offset + width_;
    const T scale = terms_.scale;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = begin + i;
      rnorm[i] = weight_rnorm[c];
      kappa[i] = terms_.kappa[c];
      bias[i] = terms_.bias[c];
      offset[i] = scale * bias[i] + terms_.prior[c];
      omega[i] = terms_.omega[c];
    }
    for (int64_t i = count; i < ld; ++i) {
      rnorm[i] = kappa[i] = bias[i] = omega[i] = 0;
      offset[i] = -std::numeric_limits<T>::infinity();
    }
    return {rnorm, kappa, bias, offset, with_omega_ ? omega : nullptr};
  }

 private:
  const Terms<T>& terms_;
  int64_t width_;
  bool with_omega_;
  std::vector<T> values_;
};

// The targets as class indices, -1 for ignored rows. Throws for a target that names no class.
inline std::vector<int64_t> read_labels(const Head& head) {
  const int64_t N = head.target.size(0), C = head.weight.size(0);
  const int64_t stride = N > 0 ? head.target.stride(0) : 1;
  const int64_t* target = data<int64_t>(head.target);
  std::vector<int64_t> label(N);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t y = target[n * stride];
    if (y == head.ignore_index) {
      label[n] = -1;
    } else if (y < 0 || y >= C) {
      throw std::out_of_range("target[" + std::to_string(n) + "] is " + std::to_string(y) +
                              ", wanted a class in [0, " + std::to_string(C) +
                              ") or ignore_index " + std::to_string(head.ignore_index));
    } else {
      label[n] = y;
    }
  }
  return label;
}

// The arguments of one call: sizes, plan, class terms and labels, in the compute dtype.
template <class T>
struct Problem {
  explicit Problem(const Head& head)
      : head(head),
        N(head.input.size(0)),
        C(head.weight.size(0)),
        D(head.input.size(1)),
        plan(plan_cpu(N, C, D, sizeof(T))),
        terms(head),
        label(read_labels(head)) {}

  const Head& head;
  int64_t N, C, D;
  CpuPlan plan;
  Terms<T> terms;
  std::vector<int64_t> label;
};

}  // namespace tvmf
