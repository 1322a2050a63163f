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
    const RowStatistics out{.lse = empty({N}, kDtype<T>),
                            .target = empty({N}, kDtype<T>),
                            .sum = empty({with_sum ? N : 0}, kDtype<T>),
                            .rank = empty({N}, ScalarType::Long),
                            .saved = empty_saved(call, kept)};
    const Saved<T> saved = saved_parts<T>(call, out.saved, kept);
    cpu::forward<T>(call, {.saved = saved,
                           .target = data<T>(out.target),
                           .sum = with_sum ? data<T>(out.sum) : nullptr,
                           .rank = data<int64_t>(out.rank)});
    for (int64_t n = 0; n < N; ++n) data<T>(out.lse)[n] = saved.max[n] + std::log(saved.sum_exp[n]);
    return out;
  });
}

Gradients row_statistics_backward(const Head& head, const StatisticsGradients& gradients,
                                  int64_t kept, const Tensor& saved, int64_t wanted) {
  return with_compute_dtype(head, [&]<class T>(T) {
    const Call<T> call(head);
    return cpu::backward<T>(call, saved_parts<const T>(call, saved, kept),
                            {.lse = read_vector<T>(gradients.lse, call.N),
                             .target = read_vector<T>(gradients.target, call.N),
                             .sum = read_vector<T>(gradients.sum, call.N),
                             .with_sum = gradients.sum.has_value()},
                            wanted);
  });
}

Loss cross_entropy(const Head& head, const LossOptions& options, int64_t kept) {
  return with_compute_dtype(head, [&]<class T>(T) {
    const Call<T> call(head);
    const cpu::RowLoss<T> row_loss(call, options);
    const int64_t N = call.N;
    const Loss out{.loss = row_loss.reduced() ? empty({}, kDtype<T>) : empty({N}, kDtype<T>),
                   .saved = empty_saved(call, kept)};
    std::vector<T> target(N), sum(row_loss.smoothed() ? N : 0);
    std::vector<int64_t> rank(N);
    const cpu::Statistics<T> statistics{.saved = saved_parts<T>(call, out.saved, kept),
                                        .target = target.data(),
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
    return cpu::backward<T>(call, saved_parts<const T>(call, saved, kept),
                            row_loss.upstream(upstream), wanted);
  });
}

}  // namespace

const Backend kCpuBackend{.row_statistics = row_statistics,
                          .row_statistics_backward = row_statistics_backward,
                          .cross_entropy = cross_entropy,
                          .cross_entropy_backward = cross_entropy_backward};

}  // namespace tvmf
