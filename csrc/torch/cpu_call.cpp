// The operators on the CPU: memory for their results, and the passes in the compute dtype.
#include <cmath>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/row_loss.h"
#include "torch/ops.h"

namespace tvmf {
namespace {

using cpu::Call, cpu::data, cpu::empty, cpu::kDtype;

// Calls function(float()) or function(double()): the type of the argument is the compute dtype.
template <class F>
auto with_compute_dtype(const Head& head, const F& function) {
  return head.input.scalar_type() == ScalarType::Double ? function(double()) : function(float());
}

template <class T>
Tensor empty_saved(const Call<T>& call, int64_t kept) {
  return cpu::populated(empty({SavedLayout(call.N, call.C, kept).size}, kDtype<T>));
}

template <class T>
Saved<T> saved_parts(const Call<std::remove_const_t<T>>& call, const Tensor& saved, int64_t kept) {
  return Saved<T>::of(data<T>(saved), call.N, call.C, kept);
}

// An upstream gradient, [N] of any stride or [], in the compute dtype; zeros where there is none.
template <class T>
std::vector<T> read_vector(const OptionalTensor& tensor, int64_t N) {
  std::vector<T> values(N);
  if (!tensor || N == 0) return values;
  const Tensor converted = to_dtype(*tensor, kDtype<T>);
  const int64_t stride = converted.dim() == 0 ? 0 : converted.stride(0);
  for (int64_t n = 0; n < N; ++n) values[n] = data<T>(converted)[n * stride];
  return values;
}

RowStatistics row_statistics(const Head& head, bool with_sum, int64_t kept) {
  return with_compute_dtype(head, [&]<class T>(T) {
    const Call<T> call(head);
    const int64_t N = call.N;
    const RowStatistics out{.others = empty({N}, kDtype<T>),
                            .cosine = empty({N}, kDtype<T>),
                            .sum = empty({with_sum ? N : 0}, kDtype<T>),
                            .rank = empty({N}, ScalarType::Long),
                            .saved = empty_saved(call, kept)};
    const Saved<T> saved = saved_parts<T>(call, out.saved, kept);
    cpu::forward<T>(call, {.saved = saved,
                           .sum = with_sum ? data<T>(out.sum) : nullptr,
                           .rank = data<int64_t>(out.rank)});
    for (int64_t n = 0; n < N; ++n) {
      data<T>(out.others)[n] = saved.max[n] + std::log(saved.sum_exp[n]);
      data<T>(out.cosine)[n] = saved.target_cosine[n];
    }
    return out;
  });
}

Gradients row_statistics_backward(const Head& head, const StatisticsGradients& gradients,
                                  int64_t kept, const Tensor& saved, int64_t wanted) {
  return with_compute_dtype(head, [&]<class T>(T) {
    const Call<T> call(head);
    const Saved<const T> parts = saved_parts<const T>(call, saved, kept);
    const std::vector<T> others = read_vector<T>(gradients.others, call.N),
                         cosine = read_vector<T>(gradients.cosine, call.N),
                         sum = read_vector<T>(gradients.sum, call.N);
    cpu::Upstream<T> upstream{std::vector<cpu::RowGradient<T>>(call.N), gradients.sum.has_value()};
    for (int64_t n = 0; n < call.N; ++n)
      upstream.rows[n] = {.others = others[n],
                          .sum = sum[n],
                          .score = 0,
                          .cosine = parts.target_cosine[n],
                          .by_cosine = cosine[n],
                          .by_logit = 0,
                          .by_phi_kappa = 0};
    return cpu::backward<T>(call, parts, upstream, wanted);
  });
}

Loss cross_entropy(const Head& head, const LossOptions& options, int64_t kept) {
  return with_compute_dtype(head, [&]<class T>(T) {
    const Call<T> call(head);
    const cpu::RowLoss<T> row_loss(call, options);
    const int64_t N = call.N;
    const Loss out{.loss = row_loss.reduced() ? empty({}, kDtype<T>) : empty({N}, kDtype<T>),
                   .saved = empty_saved(call, kept)};
    std::vector<T> sum(row_loss.smoothed() ? N : 0);
    std::vector<int64_t> rank(N);
    const cpu::Statistics<T> statistics{.saved = saved_parts<T>(call, out.saved, kept),
                                        .sum = row_loss.smoothed() ? sum.data() : nullptr,
                                        .rank = rank.data()};
    cpu::forward(call, statistics);
    row_loss.write(statistics, data<T>(out.loss));
    return out;
  });
}

Gradients cross_entropy_backward(const Head& head, const LossOptions& options,
                                 const Tensor& grad_loss, int64_t kept, const Tensor& saved,
                                 int64_t wanted) {
  return with_compute_dtype(head, [&]<class T>(T) {
    const Call<T> call(head);
    const cpu::RowLoss<T> row_loss(call, options);
    const std::vector<T> upstream = read_vector<T>(grad_loss, row_loss.reduced() ? 1 : call.N);
    const Saved<const T> parts = saved_parts<const T>(call, saved, kept);
    return cpu::backward<T>(call, parts, row_loss.upstream(parts, upstream), wanted);
  });
}

}  // namespace

const Backend kCpuBackend{.row_statistics = row_statistics,
                          .row_statistics_backward = row_statistics_backward,
                          .cross_entropy = cross_entropy,
                          .cross_entropy_backward = cross_entropy_backward};

}  // namespace tvmf
