// The terms of the logit in the compute dtype T: those of the head, and of one block of classes.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cpu/memory.h"
#include "cpu/tile.h"
#include "loss.h"
#include "torch/ops.h"

namespace tvmf::cpu {

// One value per class or one for all, given as a tensor or as a number.
template <class T>
class PerClass {
 public:
  PerClass(const OptionalTensor& tensor, double value) : value_(T(value)) {
    if (!tensor) return;
    tensor_ = to_dtype(*tensor, kDtype<T>);
    values_ = data<T>(*tensor_);
    size_ = tensor_->numel();
    stride_ = size_ > 1 ? tensor_->stride(0) : 0;
  }
  PerClass(const PerClass&) = delete;  // values_ may point to value_

  T operator[](int64_t c) const { return values_[c * stride_]; }
  int64_t size() const { return size_; }

 private:
  T value_;
  OptionalTensor tensor_;
  const T* values_ = &value_;
  int64_t stride_ = 0, size_ = 1;
};

// Throws std::invalid_argument for a value that the mathematics does not allow.
template <class T>
struct HeadTerms {
  explicit HeadTerms(const Head& head);

  // The terms of class y as the target of a row.
  TargetTerms of_target(int64_t y) const {
    return {.kappa = kappa[y],
            .bias = bias[y],
            .prior = prior[y],
            .scale = scale,
            .cosine_margin = cosine_margin[y],
            .angular_margin = angular_margin[y]};
  }

  PerClass<T> kappa, bias, prior, class_weight;
  PerClass<double> cosine_margin, angular_margin;
  T scale;
  T scale_derivative = 1;  // of the scale by the number that the caller gives

 private:
  void check_margins() const;
};

// The class terms of one block after another. They are padded to whole vectors.
template <class T>
class BlockTerms {
 public:
  // `width` is the largest row stride of a block.
  BlockTerms(const HeadTerms<T>& terms, int64_t width, bool with_class_weight);

  // Valid until the next call.
  ClassTerms<T> fill(int64_t begin, int64_t count, int64_t stride, const T* weight_rnorm);

 private:
  const HeadTerms<T>& terms_;
  int64_t width_;
  bool with_class_weight_;
  std::vector<T> values_;
};

}  // namespace tvmf::cpu
