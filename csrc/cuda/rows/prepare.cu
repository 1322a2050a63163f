#include "cuda/class_terms.cuh"
#include "cuda/rows/rows.cuh"

namespace tvmf::rows {
namespace {

constexpr int kThreads = 128, kLoads = 4;

// Each of the first N blocks has a row: it makes the row's norm, its product with its target's
// weight, and the target's score and logit. The blocks beyond arrange the features. Latency bounds
// this kernel, so the loads of a row of up to 2048 features are in flight at once. The launch
// bounds say that seven blocks share a multiprocessor, which leaves enough registers for this;
// otherwise the compiler moves each load to its use.
template <Math kMath, class W>
__global__ void __launch_bounds__(kThreads, 7)
    prepare_rows(const __grid_constant__ PrepareParams<typename MathTraits<kMath>::Acc> p) {
  using X = typename MathTraits<kMath>::X;
  using T = typename MathTraits<kMath>::Acc;
  const CudaHead& head = p.head;
  const int64_t n = blockIdx.x;
  if (n >= head.N) {
    sm90::arrange(head, p.arranged, (n - head.N) * kThreads + threadIdx.x);
    return;
  }
  const auto x = Operand<X>::of(head.x, head.N, head.D);
  const auto weight = Operand<W>::of(head.weight, head.C, head.D);

  const int64_t y = label_of(head, n);
  const bool valid = y >= 0, wrong = y == kWrong;
  const TargetTerms terms = valid ? target_terms<T>(head, y) : TargetTerms{};
  const X* x_line = x.data + n * x.line_stride;
  const W* w_line = weight.data + (valid ? y : 0) * weight.line_stride;
  T sums[3] = {};  // |x|^2, |w|^2, <x, w>
  const auto add_runs = [&](auto run) {
    constexpr int kRun = decltype(run)::value;
    struct XRun {
      X element[kRun];
    };
    struct WRun {
      W element[kRun];
    };
    constexpr int64_t kStep = kThreads * kRun;
    for (int64_t first = threadIdx.x * kRun; first < head.D; first += kLoads * kStep) {
      XRun xs[kLoads];
      WRun ws[kLoads];
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        const int64_t k = first + load * kStep;
        const bool inside = k < head.D;
        xs[load] = inside ? load_as<XRun>(x_line + k * x.element_stride) : XRun{};
        ws[load] = inside && valid ? load_as<WRun>(w_line + k * weight.element_stride) : WRun{};
      }
#pragma unroll
      for (int load = 0; load < kLoads; ++load)
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const T xi = as_operand<kMath>(to_number<T>(xs[load].element[i]));
          const T wi = as_operand<kMath>(to_number<T>(ws[load].element[i]));
          sums[0] = fma(xi, xi, sums[0]);
          sums[1] = fma(wi, wi, sums[1]);
          sums[2] = fma(xi, wi, sums[2]);
        }
    }
  };
  constexpr int kRun = 16 / (sizeof(W) > sizeof(X) ? sizeof(W) : sizeof(X));
  if (x.vectors && weight.vectors && head.D % kRun == 0)
    add_runs(std::integral_constant<int, kRun>{});
  else
    add_runs(std::integral_constant<int, 1>{});
  // phi' multiplies the error of the target's cosine in an easy row, so that its sums are float64.
  double totals[3] = {sums[0], sums[1], sums[2]};
  block_sums(totals, static_cast<double*>(shared_memory()));
  if (threadIdx.x != 0) return;

  const auto [x_squares, w_squares, product] = totals;
  const T x_rnorm = rnorm_of(T(x_squares));
  T score = 0;
  double cosine = 0, logit = 0;
  if (valid) {
    cosine = clamp_cosine(product * rnorm_of(x_squares) * rnorm_of(w_squares));
    logit = target_logit(cosine, terms).value;
    // As the tiles compute the score of a class, so that equal classes tie.
    score = similarity(cosine_of(T(product), x_rnorm, rnorm_of(T(w_squares))), T(terms.kappa)) +
            T(terms.bias);
  }
  if (head.target_score.data) {
    score = value_at<T>(head.target_score, n);
    // Hopper's exponentials are relative to the target's logit, wherever its class is.
    if (y == kElsewhere) logit = Scale<T>::of(head).value * score;
  }
  // A wrong label must not kill the context: its row is NaN, and the host finds the flag.
  if (wrong) raise_flag(head.bad_label);
  p.saved.x_rnorm[n] = x_rnorm;
  p.saved.target_cosine[n] = wrong ? T(NAN) : T(cosine);
  p.saved.target_logit[n] = wrong ? T(NAN) : T(logit);
  p.targets.label[n] = y;
  p.targets.score[n] = score;
}

}  // namespace

template <class T>
cudaError_t launch_prepare(const PrepareParams<T>& p, Math math, cudaStream_t stream) {
  return with_math_of<T>(math, p.head.weight.dtype, [&](auto kind, auto weight) {
    constexpr Math kMath = decltype(kind)::value;
    const int64_t blocks = p.head.N + ceil_div(p.arranged.items(), kThreads);
    return launch_kernel(prepare_rows<kMath, decltype(weight)>, dim3(unsigned(blocks)), kThreads,
                         3 * kThreads / kWarp * 8, stream, p);
  });
}
template cudaError_t launch_prepare(const PrepareParams<float>&, Math, cudaStream_t);
template cudaError_t launch_prepare(const PrepareParams<double>&, Math, cudaStream_t);

}  // namespace tvmf::rows
