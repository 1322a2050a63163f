// The loss of a call's rows as a function of their statistics, and its gradients by them; loss.h
// has the formulas. The mean divides by the class weights of the rows that count.
#pragma once

#include <cmath>

#include "cpu/backward.h"
#include "cpu/call.h"
#include "cpu/forward.h"
#include "loss.h"

namespace tvmf::cpu {

template <class T>
class RowLoss {
 public:
  RowLoss(const Call<T>& call, const LossOptions& options) : call_(call), options_(options) {
    for (int64_t y : call.label) total_weight_ += y < 0 ? 0 : call.terms.class_weight[y];
    for (int64_t c = 0; smoothed() && c < call.C; ++c) omega_sum_ += call.terms.class_weight[c];
  }

  bool smoothed() const { return options_.label_smoothing > 0; }
  bool reduced() const { return options_.reduction != Reduction::kNone; }

  // The losses of the rows, [N], or their sum or mean, [].
  void write(const Statistics<T>& statistics, T* loss) const {
    const Saved<T>& saved = statistics.saved;
    double total = 0;
    for (int64_t n = 0; n < call_.N; ++n) {
      double row = 0;
      if (call_.label[n] >= 0)
        row = row_loss(weights(n), saved.max[n], std::log(double(saved.sum_exp[n])),
                       saved.target_logit[n], smoothed() ? statistics.sum[n] : 0);
      total += row;
      if (!reduced()) loss[n] = T(row);
    }
    if (options_.reduction == Reduction::kMean) total /= total_weight_;
    if (reduced()) loss[0] = T(total);
  }

  // Gradients of the statistics from those of the loss, [N], or [1] where it is reduced.
  Upstream<T> upstream(const Saved<const T>& saved, const std::vector<T>& grad_loss) const {
    Upstream<T> out{std::vector<RowGradient<T>>(call_.N), smoothed()};
    for (int64_t n = 0; n < call_.N; ++n) {
      const int64_t y = call_.label[n];
      if (y < 0) continue;
      double of_row = grad_loss[reduced() ? 0 : n];
      if (options_.reduction == Reduction::kMean) of_row /= total_weight_;
      const RowGradients g =
          row_gradients(weights(n), saved.max[n], std::log(double(saved.sum_exp[n])),
                        saved.target_logit[n], of_row);
      const TargetLogit target = target_logit(saved.target_cosine[n], call_.terms.of_target(y));
      out.rows[n] = {.others = T(g.others),
                     .sum = T(g.sum),
                     .score = T(target.score),
                     .cosine = saved.target_cosine[n],
                     .by_cosine = T(g.target * target.by_cosine),
                     .by_logit = T(g.target),
                     .by_phi_kappa = T(g.target * target.phi_by_kappa)};
    }
    return out;
  }

 private:
  RowWeights weights(int64_t n) const {
    return RowWeights::of(options_.label_smoothing, double(call_.C),
                          call_.terms.class_weight[call_.label[n]], omega_sum_);
  }

  const Call<T>& call_;
  const LossOptions options_;
  double omega_sum_ = 0;  // over the classes
  double total_weight_ = 0;
};

}  // namespace tvmf::cpu
