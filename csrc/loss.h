// The part of a row that belongs to its target: margins, the target's logit, and the loss with its
// gradients. All of it is O(N) work, which every path does in float64 by these functions alone.
//   c' = cos(theta + a) - m          z' = scale (phi(c'; kappa) + bias) + prior
//   loss = (1 - e) omega_y softplus(others - z') + e / C (lse Omega - sum - omega_y z')
#pragma once

#include <cmath>
#include <cstdint>

#include "similarity.h"

namespace tvmf {

// A row whose label is none of the C classes: its target is ignored, names no class, or names one
// of another shard's classes.
constexpr int64_t kIgnored = -1, kWrong = -2, kElsewhere = -3;

// The class that a row's target names, or one of the above. `sharded`: the classes are a part of
// all, so that a target outside [0, C) names one of the others.
TVMF_HOST_DEVICE int64_t label_of(int64_t target, int64_t ignore_index, int64_t C, bool sharded) {
  if (target == ignore_index) return kIgnored;
  if (target >= 0 && target < C) return target;
  return sharded ? kElsewhere : kWrong;
}

// The terms of a row's target class.
struct TargetTerms {
  double kappa, bias, prior, scale;
  double cosine_margin, angular_margin;  // m and a
};

// The target's logit and its derivatives.
struct TargetLogit {
  double score;  // phi + bias
  double value;
  double by_cosine;  // dz'/dc
  double phi_by_kappa;
};

// (1 - c)(1 + c) = sin^2 theta below which the square root becomes a straight line, so that its
// derivative stays finite where feature and weight are parallel.
constexpr double kSmallestSquaredSine = 1e-12;

// Of an angle in [0, pi]. A GPU's sincos also serves huge angles, for which it needs local memory;
// sincospi does not.
TVMF_HOST_DEVICE void sine_and_cosine(double angle, double* sine, double* cosine) {
#ifdef __CUDA_ARCH__
  sincospi(angle * 0.31830988618379067, sine, cosine);
#else
  *sine = sin(angle);
  *cosine = cos(angle);
#endif
}

// The angular margin adds to the angle theta of the cosine. Beyond theta + a = pi the cosine would
// rise again, and -2 - cos(theta + a) continues it without a jump.
TVMF_HOST_DEVICE TargetLogit target_logit(double cosine, const TargetTerms& terms) {
  double moved = cosine, by_cosine = 1;
  if (terms.angular_margin != 0) {
    double sin_a, cos_a;
    sine_and_cosine(terms.angular_margin, &sin_a, &cos_a);
    const double squared = (1 - cosine) * (1 + cosine), smallest = sqrt(kSmallestSquaredSine);
    const bool straight = squared < kSmallestSquaredSine;
    const double sine =
        straight ? (squared + kSmallestSquaredSine) / (2 * smallest) : sqrt(squared);
    moved = cosine * cos_a - sine * sin_a;
    by_cosine = cos_a + cosine * sin_a / (straight ? smallest : sine);
    if (cosine < -cos_a) {
      moved = -2 - moved;
      by_cosine = -by_cosine;
    }
  }
  const auto s = similarity_with_gradient(moved - terms.cosine_margin, terms.kappa);
  const double score = s.phi + terms.bias;
  return {score, terms.scale * score + terms.prior, terms.scale * s.dphi_dcosine * by_cosine,
          s.dphi_dkappa};
}

// Beyond this angular margin the angle of some features would pass 2 pi.
constexpr double kLargestAngle = 3.141592653589793;

// The smallest kappa for which the denominator of phi stays positive at every angle.
inline double smallest_kappa(double cosine_margin, double angular_margin) {
  return -1 / (3 - cos(angular_margin) + cosine_margin);
}

// The factors of a row's loss.
struct RowWeights {
  double target;         // (1 - e) omega_y
  double smooth;         // e / C
  double smooth_target;  // e / C omega_y
  double smooth_total;   // e / C sum_c omega_c

  static TVMF_HOST_DEVICE RowWeights of(double label_smoothing, double C, double omega,
                                        double omega_sum) {
    const double smooth = label_smoothing / C;
    return {(1 - label_smoothing) * omega, smooth, smooth * omega, smooth * omega_sum};
  }
};

// log(1 + exp(v)), whose relative error is small for every v.
TVMF_HOST_DEVICE double softplus(double v) { return v > 0 ? v + log1p(exp(-v)) : log1p(exp(v)); }

// `others` is max + log_sum, kept in two parts: max - target is exact where the two are close, and
// is -inf where there is no other class.
TVMF_HOST_DEVICE double row_loss(const RowWeights& weights, double max, double log_sum,
                                 double target, double sum) {
  const double gap = (max - target) + log_sum;
  double loss = weights.target * softplus(gap);
  if (weights.smooth > 0) {
    const double lse = gap > 0 ? max + log_sum + softplus(-gap) : target + softplus(gap);
    loss += weights.smooth_total * lse - weights.smooth * sum - weights.smooth_target * target;
  }
  return loss;
}

// Gradients of the loss by others, the target's logit and sum. They are 0 together where there is
// no other class.
struct RowGradients {
  double others, target, sum;
};
TVMF_HOST_DEVICE RowGradients row_gradients(const RowWeights& weights, double max, double log_sum,
                                            double target, double upstream) {
  const double gap = (max - target) + log_sum, e = exp(gap > 0 ? -gap : gap);
  const double of_others = (gap > 0 ? 1 : e) / (1 + e), of_target = (gap > 0 ? e : 1) / (1 + e);
  return {upstream * (weights.target + weights.smooth_total) * of_others,
          upstream * ((weights.smooth_total * of_target - weights.smooth_target) -
                      weights.target * of_others),
          -upstream * weights.smooth};
}

}  // namespace tvmf
