// The loss of a row as a function of its statistics, and its gradients by them.
//   loss_n = (1 - e) omega_y (lse - target) + e / C (lse sum_c omega_c - sum)
// omega are the class weights and e is the label smoothing. The mean divides by the class weights
// of the rows that count.
#pragma once

#include <cmath>

#include "cpu/backward.h"
#include "cpu/call.h"
#include "cpu/forward.h"

namespace tvmf::cpu {

template <class T>
class RowLoss {
 public:
  RowLoss(const Call<T>& call, const LossOptions& options)
      : call_(call),
        options_(options),
        keep_(1 - options.label_smoothing),
        smooth_(options.label_smoothing / call.C) {
    for (int64_t y : call.label) total_weight_ += y < 0 ? 0 : call.terms.class_weight[y];
    for (int64_t c = 0; smoothed() && c < call.C; ++c) smooth_total_ += call.terms.class_weight[c];
    smooth_total_ *= smooth_;
  }

  bool smoothed() const { return smooth_ > 0; }
  bool reduced() const { return options_.reduction != Reduction::kNone; }

  // The losses of the rows, [N], or their sum or mean, [].
  void write(const Statistics<T>& statistics, T* loss) const {
    double total = 0;
    for (int64_t n = 0; n < call_.N; ++n) {
      const double row = of_row(statistics, n);
      total += row;
      if (!reduced()) loss[n] = T(row);
    }
    if (options_.reduction == Reduction::kMean) total /= total_weight_;
    if (reduced()) loss[0] = T(total);
  }

  // Gradients of the statistics from those of the loss, [N], or [1] where it is reduced.
  Upstream<T> upstream(const std::vector<T>& grad_loss) const {
    const int64_t N = call_.N;
    Upstream<T> out{std::vector<T>(N), std::vector<T>(N), std::vector<T>(N), smoothed()};
    for (int64_t n = 0; n < N; ++n) {
      const int64_t y = call_.label[n];
      if (y < 0) continue;
      double g = grad_loss[reduced() ? 0 : n];
      if (options_.reduction == Reduction::kMean) g /= total_weight_;
      const double weighted = keep_ * call_.terms.class_weight[y];
      out.lse[n] = T(g * (weighted + smooth_total_));
      out.target[n] = T(-g * weighted);
      out.sum[n] = T(-g * smooth_);
    }
    return out;
  }

 private:
  double of_row(const Statistics<T>& statistics, int64_t n) const {
    const int64_t y = call_.label[n];
    if (y < 0) return 0;
    // max - target comes first: it is exactly 0 for a row that fits well.
    const T max = statistics.saved.max[n];
    const double log_sum = std::log(double(statistics.saved.sum_exp[n]));
    double loss = keep_ * call_.terms.class_weight[y] * (max - statistics.target[n] + log_sum);
    if (smoothed()) loss += smooth_total_ * (max + log_sum) - smooth_ * statistics.sum[n];
    return loss;
  }

  const Call<T>& call_;
  const LossOptions options_;
  const double keep_, smooth_;  // 1 - e, and e / C
  double smooth_total_ = 0;     // e / C sum_c omega_c
  double total_weight_ = 0;
};

}  // namespace tvmf::cpu
