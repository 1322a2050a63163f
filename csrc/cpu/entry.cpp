// The four operators on the CPU: statistics and loss, forward and backward.
#include <cmath>
#include <limits>

#include "cpu/passes.h"

namespace tvmf {
namespace {

template <class T>
std::vector<T> read_vector(const std::optional<Tensor>& tensor, int64_t N) {
  std::vector<T> values(N);
  if (!tensor || N == 0) return values;
  const Tensor converted = to_dtype(*tensor, kDtype<T>);
  const int64_t stride = converted.dim() == 0 ? 0 : converted.stride(0);
  for (int64_t n = 0; n < N; ++n) values[n] = data<T>(converted)[n * stride];
  return values;
}

// The loss per row is (1 - e) omega_y (lse - target) + e / C (lse sum_c omega_c - sum).
template <class T>
struct LossTerms {
  LossTerms(const Problem<T>& problem, const LossOptions& options)
      : keep(1 - options.label_smoothing), smooth(options.label_smoothing / problem.C) {
    for (int64_t y : problem.label) total_weight += y < 0 ? 0 : problem.terms.omega[y];
    for (int64_t c = 0; smooth > 0 && c < problem.C; ++c) smooth_total += problem.terms.omega[c];
    smooth_total *= smooth;
  }
  double keep, smooth, smooth_total = 0, total_weight = 0;
};

template <class T>
Loss cross_entropy(const Head& head, const LossOptions& options, int64_t kept) {
  const Problem<T> problem(head);
  const int64_t N = problem.N;
  const bool reduced = options.reduction != Reduction::kNone,
             with_sum = options.label_smoothing > 0;
  Tensor loss = reduced ? empty({}, kDtype<T>) : empty({N}, kDtype<T>);
  const Tensor saved = populated(empty({SavedLayout(N, problem.C, kept).size}, kDtype<T>));
  std::vector<T> target(N), sum(with_sum ? N : 0);
  std::vector<int64_t> rank(N);
  make_statistics(problem, with_sum, kept, data<T>(saved), target.data(), sum.data(), rank.data());

  const LossTerms<T> terms(problem, options);
  const SavedLayout layout(N, problem.C, kept);
  const T *max = data<T>(saved) + layout.max, *sum_exp = data<T>(saved) + layout.sum_exp;
  double total = 0;
  for (int64_t n = 0; n < N; ++n) {
    double row = 0;
    const double log_sum = std::log(double(sum_exp[n]));
    if (const int64_t y = problem.label[n]; y >= 0) {
      row = terms.keep * problem.terms.omega[y] * (max[n] - target[n] + log_sum);
      if (with_sum) row += terms.smooth_total * (max[n] + log_sum) - terms.smooth * sum[n];
    }
    total += row;
    if (!reduced) data<T>(loss)[n] = T(row);
  }
  if (options.reduction == Reduction::kMean) total /= terms.total_weight;
  if (reduced) data<T>(loss)[0] = T(total);
  return {loss, saved};
}

template <class T>
Gradients cross_entropy_backward(const Head& head, const LossOptions& options, const Tensor& saved,
                                 int64_t kept, const Tensor& grad_loss, int64_t wanted) {
  const Problem<T> problem(head);
  const LossTerms<T> terms(problem, options);
  const int64_t N = problem.N;
  const bool reduced = options.reduction != Reduction::kNone;
  const std::vector<T> upstream = read_vector<T>(grad_loss, reduced ? 1 : N);

  RowUpstream<T> rows{std::vector<T>(N), std::vector<T>(N), std::vector<T>(N)};
  for (int64_t n = 0; n < N; ++n) {
    const int64_t y = problem.label[n];
    if (y < 0) continue;
    double g = upstream[reduced ? 0 : n];
    if (options.reduction == Reduction::kMean) g /= terms.total_weight;
    const double weighted = terms.keep * problem.terms.omega[y];
    rows.lse[n] = T(g * (weighted + terms.smooth_total));
    rows.target[n] = T(-g * weighted);
    rows.sum[n] = T(-g * terms.smooth);
  }
  return make_gradients<T>(problem, data<T>(saved), kept, rows, options.label_smoothing > 0,
                           wanted);
}

template <class F>
auto with_compute_dtype(const Head& head, const F& f) {
  return head.input.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace

RowStatistics cpu_row_statistics(const Head& head, bool with_sum, int64_t kept) {
  return with_compute_dtype(head, [&](auto t) {
    using T = decltype(t);
    const Problem<T> problem(head);
    const int64_t N = problem.N;
    const Tensor saved = populated(empty({SavedLayout(N, problem.C, kept).size}, kDtype<T>));
    RowStatistics out{empty({N}, kDtype<T>), empty({N}, kDtype<T>),
                      empty({with_sum ? N : 0}, kDtype<T>), empty({N}, ScalarType::Long), saved};
    make_statistics(problem, with_sum, kept, data<T>(saved), data<T>(out.target), data<T>(out.sum),
                    data<int64_t>(out.rank));
    const SavedLayout layout(N, problem.C, kept);
    const T *max = data<T>(saved) + layout.max, *sum_exp = data<T>(saved) + layout.sum_exp;
    for (int64_t n = 0; n < N; ++n) data<T>(out.lse)[n] = max[n] + std::log(sum_exp[n]);
    return out;
  });
}

Gradients cpu_row_statistics_backward(const Head& head, const Tensor& saved, int64_t kept,
                                      const std::optional<Tensor>& grad_lse,
                                      const std::optional<Tensor>& grad_target,
                                      const std::optional<Tensor>& grad_sum, int64_t wanted) {
  return with_compute_dtype(head, [&](auto t) {
    using T = decltype(t);
    const Problem<T> problem(head);
    const int64_t N = problem.N;
    const RowUpstream<T> rows{read_vector<T>(grad_lse, N), read_vector<T>(grad_target, N),
                              read_vector<T>(grad_sum, N)};
    return make_gradients<T>(problem, data<T>(saved), kept, rows, grad_sum.has_value(), wanted);
  });
}

Loss cpu_cross_entropy(const Head& head, const LossOptions& options, int64_t kept) {
  return with_compute_dtype(
      head, [&](auto t) { return cross_entropy<decltype(t)>(head, options, kept); });
}

Gradients cpu_cross_entropy_backward(const Head& head, const LossOptions& options,
                                     const Tensor& saved, int64_t kept, const Tensor& grad_loss,
                                     int64_t wanted) {
  return with_compute_dtype(head, [&](auto t) {
    return cross_entropy_backward<decltype(t)>(head, options, saved, kept, grad_loss, wanted);
  });
}

}  // namespace tvmf
