// The part of each row in the gradients of all classes, and the loss scale, which the first block
// of prepare_gradient makes, and on Hopper every block of kept_gradient.
#pragma once

#include "cuda/rows/gradient_row.cuh"
#include "cuda/rows/rows.cuh"

namespace tvmf::rows {

constexpr int kGradientThreads = 512;                             // of a block that makes them
constexpr int kGradientBytes = 5 * kGradientThreads / kWarp * 8;  // of its sums

// A bound on the slope of phi over the classes of a row:
//   dphi/dc = (1 + kappa (1 + phi))^2 / (1 + 2 kappa)
// As a function of kappa it is largest at the smallest or the largest kappa of a class.
struct SteepestPhi {
  double smallest_kappa, largest_kappa;
  double offset;  // the logit of a class is at least scale phi - offset

  // Of a row none of whose logits is above `max`. The slope rises with phi where kappa is positive.
  __device__ __forceinline__ double of(double max, double scale) const {
    const double most = scale > 0 ? (max + offset) / scale : 1.0;
    const double phi = most > -1 && most < 1 ? most : most < 0 ? -1.0 : 1.0;
    const auto slope = [&](double kappa) {
      const double rise = 1 + (kappa > 0 ? kappa * (1 + phi) : 0);
      return rise * rise / (1 + 2 * kappa);
    };
    return larger(slope(smallest_kappa), slope(largest_kappa));
  }
};

// Makes dL/dothers, dL/dsum and the target's gradient of every row: store(n, row, target) gets
// those of row n, whose scaled_rnorm is its rnorm still. Returns the loss scale of float16 gradient
// tiles, or 1; the first block of the launch writes it, and scale_rest. Latency bounds this: the
// loads of a row's terms are in flight while the block makes sums over all rows and classes. `smem`
// has kGradientBytes.
template <bool kAhead, class T, class Store>
__device__ __forceinline__ T make_gradient_rows(const PrepareGradientParams<T>& p, double* smem,
                                                const Store& store) {
  const CudaHead& head = p.head;
  const bool of_loss = p.upstream.loss.data, mean = p.options.reduction == Reduction::kMean;
  const auto omega_of = [&](int64_t label) {
    return double(value_at<T>(head.class_weight, label));
  };
  struct Terms {
    int64_t label;
    T rnorm, max, sum_exp, target_cosine, target_logit;
    T upstream[3];  // the gradient of the loss, or those of others, cosine and sum
    TargetTerms target;
    double omega;
  };
  const auto terms_of = [&](int64_t n) {
    if (n >= head.N) return Terms{};
    Terms terms{label_of(head, n),
                p.saved.x_rnorm[n],
                p.saved.max[n] == kLowest<T> ? T(0) : p.saved.max[n],  // there is no other class
                p.saved.sum_exp[n],
                p.saved.target_cosine[n],
                p.saved.target_logit[n],
                {},
                {},
                0};
    if (!of_loss) {
      terms.upstream[0] = value_at<T>(p.upstream.others, n);
      terms.upstream[1] = value_at<T>(p.upstream.cosine, n);
      terms.upstream[2] = value_at<T>(p.upstream.sum, n);
    } else if (terms.label >= 0) {
      terms.upstream[0] = value_at<T>(p.upstream.loss, n);
      terms.target = target_terms<T>(head, terms.label);
      terms.omega = omega_of(terms.label);
    }
    return terms;
  };
  Terms next = terms_of(threadIdx.x);

  double sums[2] = {};    // class weights summed over the rows' labels, and over the classes
  double maxima[5] = {};  // of the class weights, and of what bounds phi' (SteepestPhi)
  if (of_loss && mean) {
    // Of all rows: those of other segments have indices below 0 and beyond N.
    const int64_t end = p.segment.all - p.segment.begin;
    for (int64_t n = int64_t(threadIdx.x) - p.segment.begin; n < end; n += kGradientThreads) {
      const int64_t label = label_of(head, n);
      sums[0] += label < 0 ? 0 : omega_of(label);
    }
  }
  const bool weighted = head.class_weight.data;
  if (p.with_sum && weighted) {
    for_values<T>(head.class_weight, head.C, [&](double omega) {
      sums[1] += omega;
      maxima[0] = larger(omega, maxima[0]);
    });
  }
  const T scale = Scale<T>::of(head).value;
  if (p.float16) {
    const auto note_kappa = [&](double kappa) {
      maxima[1] = larger(1 + 2 * kappa, maxima[1]);
      maxima[2] = larger(1 / (1 + 2 * kappa), maxima[2]);
    };
    const auto note_bias = [&](double bias) { maxima[3] = larger(-bias, maxima[3]); };
    const auto note_prior = [&](double prior) {
      if (prior > -1e30) maxima[4] = larger(-prior, maxima[4]);
    };
    const auto over_classes = [&](const VectorRef& vector, const auto& note) {
      if (vector.data && vector.stride != 0)
        for_values<T>(vector, head.C, note);
      else
        note(value_at<T>(vector, 0));
    };
    over_classes(head.kappa, note_kappa);
    over_classes(head.bias, note_bias);
    over_classes(head.prior, note_prior);
  }
  if ((of_loss && mean) || (p.with_sum && weighted)) block_sums(sums, smem);
  if ((p.with_sum && weighted) || p.float16) block_maxima(maxima, smem);
  const double total_weight = sums[0];
  const double omega_sum = weighted ? sums[1] : head.class_weight.value * double(head.C);
  const double omega_max = weighted ? maxima[0] : head.class_weight.value;

  const SteepestPhi steepest{(1 / maxima[2] - 1) / 2, (maxima[1] - 1) / 2,
                             fabs(double(scale)) * maxima[3] + maxima[4]};
  double largest[1] = {}, rest = 0;
  for (int64_t n = threadIdx.x; n < head.N; n += kGradientThreads) {
    const Terms terms = next;
    if constexpr (kAhead) next = terms_of(n + kGradientThreads);
    const bool none = terms.sum_exp < kSmallestSum<T> || terms.sum_exp == 0;
    // A row whose label names no class has no gradient, like an ignored row.
    T a = 0, s = 0;
    TargetGradient<T> target{terms.target_cosine, 0, 0, 0};
    if (of_loss && terms.label >= 0) {
      const double upstream = mean ? terms.upstream[0] / total_weight : double(terms.upstream[0]);
      const RowGradients g = row_gradients(
          RowWeights::of(p.options.label_smoothing, double(head.C), terms.omega, omega_sum),
          terms.max, log_of_sum(terms.sum_exp), terms.target_logit, upstream);
      const TargetLogit logit = target_logit(terms.target_cosine, terms.target);
      a = T(g.others);
      s = T(g.sum);
      // The g of a row's classes add up to 0, so that the maximum, which the totals subtract from
      // each logit, belongs to the target.
      rest += g.target * (logit.value - terms.target.prior - double(terms.max));
      target.by_cosine = T(g.target * logit.by_cosine);
      target.by_logit = T(g.target);
      target.phi_by_kappa = T(logit.phi_by_kappa);
    } else if (!of_loss && terms.label != kWrong) {
      a = terms.upstream[0];
      target.by_cosine = terms.label >= 0 ? terms.upstream[1] : T(0);
      s = terms.upstream[2];
      const double omega = terms.label >= 0 && p.with_sum ? omega_of(terms.label) : 0;
      if (none) a = 0;
      rest += (double(a) + double(s) * (omega_sum - omega)) * double(terms.max);
    }
    const T others = none ? T(0) : a / terms.sum_exp;
    store(n, GradientRow<T>{terms.rnorm, terms.rnorm, terms.max, others, s, terms.label}, target);
    if (p.float16) {
      // No logit is above the maximum, with which the slope of phi rises.
      const double g = fabs(double(others)) + fabs(double(s)) * omega_max;
      const double bound = g * fabs(double(scale)) * steepest.of(terms.max, double(scale));
      largest[0] = larger(larger(bound, fabs(double(target.by_cosine))), largest[0]);
    }
    if constexpr (!kAhead) next = terms_of(n + kGradientThreads);
  }
  double rests[1] = {rest};
  block_sums(rests, smem);
  const bool writes = blockIdx.x == 0 && threadIdx.x == 0;
  if (writes)
    *p.gradient.scale_rest = p.segment.begin == 0 ? rests[0] : *p.gradient.scale_rest + rests[0];
  if (!p.float16) {
    if (writes) p.gradient.loss_scale[0] = p.gradient.loss_scale[1] = 1;
    return 1;
  }

  // The loss scale brings the bound on |t| times the rnorms of two unit rows, each below 2^-7, to
  // 2^13; float16 reaches 2^16. A gradient that is not finite stays so.
  block_maxima(largest, smem);
  const int wanted = largest[0] > 0 && largest[0] < infinity<double>() ? 26 - ilogb(largest[0]) : 0;
  const int exponent = wanted > 126 ? 126 : wanted < -126 ? -126 : wanted;
  const T loss_scale = T(exp2(double(exponent)));
  if (writes) p.gradient.loss_scale[0] = loss_scale, p.gradient.loss_scale[1] = 1 / loss_scale;
  return loss_scale;
}

}  // namespace tvmf::rows
