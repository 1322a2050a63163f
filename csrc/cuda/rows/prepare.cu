#include "cuda/class_terms.cuh"
#include "cuda/rows/rows.cuh"
#include "cuda/sm90/logits.cuh"

namespace tvmf::rows {
namespace {

constexpr int kThreads = 128, kLoads = 4;

// The sum of f over a line's elements, for all lanes of the warp.
template <class F>
__device__ __forceinline__ float line_sum(const Operand<float>& matrix, int64_t line, const F& f) {
  const float* from = matrix.data + line * matrix.line_stride;
  const int lane = threadIdx.x % kWarp;
  float sum = 0;
  if (matrix.vectors && matrix.elements % 4 == 0) {
    struct alignas(16) Four {
      float v[4];
    };
#pragma unroll 4
    for (int64_t d = lane * 4; d < matrix.elements; d += 4 * kWarp) {
      const Four four = load_as<Four>(from + d);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += f(four.v[i]);
    }
  } else {
    for (int64_t d = lane; d < matrix.elements; d += kWarp)
      sum += f(from[d * matrix.element_stride]);
  }
  return warp_sum(sum);
}
__device__ __forceinline__ float scale_of_line(const Operand<float>& matrix, int64_t line) {
  return unit_scale(rnorm_of(line_sum(matrix, line, [](float v) { return v * v; })));
}

// A warp makes the norm of a class's weights, rounded to float16 as the products round them.
__device__ __forceinline__ void prepare_class(const PrepareParams<float>& p, int64_t c) {
  if (c >= p.head.C) return;
  const auto weight = Operand<float>::of(p.head.weight, p.head.C, p.head.D);
  const float scale = scale_of_line(weight, c);
  const float squares = line_sum(weight, c, [&](float v) {
    const float rounded = as_operand<Math::kF16>(v * scale);
    return rounded * rounded;
  });
  if (threadIdx.x % kWarp == 0) p.saved.weight_rnorm[c] = rnorm_of(squares, scale);
}

// The blocks that make the norms of the classes.
template <Math kMath, class W>
TVMF_HOST_DEVICE int64_t class_blocks(int64_t C) {
  return kUnitWeights<kMath, W> ? ceil_div(C, kThreads / kWarp) : 0;
}

// Each of the first N blocks has a row: it makes the row's norm, its product with its target's
// weight, and the target's score and logit. The blocks beyond make the norms of the classes, where
// the products need them before they start, and arrange the features. Latency bounds this kernel,
// so the loads of a row of up to 2048 features are in flight at once. The launch bounds say that
// six blocks share a multiprocessor, which leaves enough registers for this; otherwise the
// compiler moves each load to its use.
template <Math kMath, class W>
__global__ void __launch_bounds__(kThreads, 6)
    prepare_rows(const __grid_constant__ PrepareParams<typename MathTraits<kMath>::Acc> p) {
  using X = typename MathTraits<kMath>::X;
  using T = typename MathTraits<kMath>::Acc;
  const CudaHead& head = p.head;
  const int64_t n = blockIdx.x;
  if (n >= head.N) {
    const int64_t block = n - head.N, arranging = block - class_blocks<kMath, W>(head.C);
    if (arranging >= 0) {
      sm90::arrange(head, p.arranged, arranging * kThreads + threadIdx.x);
    } else if constexpr (kUnitWeights<kMath, W>) {
      prepare_class(p, (block * kThreads + threadIdx.x) / kWarp);
    }
    return;
  }
  const auto x = Operand<X>::of(head.x, head.N, head.D);
  const auto weight = Operand<W>::of(head.weight, head.C, head.D);

  const int64_t y = label_of(head, n);
  const bool valid = y >= 0, wrong = y == kWrong;
  const TargetTerms terms = valid ? target_terms<T>(head, y) : TargetTerms{};
  const X* x_line = x.data + n * x.line_stride;
  const W* w_line = weight.data + (valid ? y : 0) * weight.line_stride;
  T w_scale = 1;
  if constexpr (kUnitWeights<kMath, W>)
    if (valid) w_scale = scale_of_line(weight, y);
  T sums[3] = {};  // |x|^2, |w|^2, <x, w>, of w times w_scale
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
          T wi = to_number<T>(ws[load].element[i]);
          if constexpr (kUnitWeights<kMath, W>) wi *= w_scale;
          wi = as_operand<kMath>(wi);
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
    const double w_rnorm = rnorm_of(w_squares, double(w_scale)) / w_scale;
    cosine = clamp_cosine(product * rnorm_of(x_squares) * w_rnorm);
    logit = target_logit(cosine, terms).value;
    // As the tiles compute the score of a class, so that equal classes tie.
    const T rnorm = operand_rnorm<kMath, W>(rnorm_of(T(w_squares), w_scale));
    T phi = 0;
    if constexpr (sizeof(T) == 4)
      if (p.arranged.by_rows) phi = sm90::target_phi(T(product), x_rnorm, rnorm, T(terms.kappa));
    if (!p.arranged.by_rows)
      phi = similarity(cosine_of(T(product), x_rnorm, rnorm), T(terms.kappa));
    score = phi + T(terms.bias);
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
  if (n == 0) *p.finished = 0;
  p.targets.label[n] = y;
  p.targets.score[n] = score;
}

}  // namespace

template <class T>
cudaError_t launch_prepare(const PrepareParams<T>& p, Math math, cudaStream_t stream) {
  return with_math_of<T>(math, p.head.weight.dtype, [&](auto kind, auto weight) {
    constexpr Math kMath = decltype(kind)::value;
    using W = decltype(weight);
    const int64_t blocks =
        p.head.N + class_blocks<kMath, W>(p.head.C) + ceil_div(p.arranged.items(), kThreads);
    return launch_kernel(prepare_rows<kMath, W>, dim3(unsigned(blocks)), kThreads,
                         3 * kThreads / kWarp * 8, stream, p);
  });
}
template cudaError_t launch_prepare(const PrepareParams<float>&, Math, cudaStream_t);
template cudaError_t launch_prepare(const PrepareParams<double>&, Math, cudaStream_t);

}  // namespace tvmf::rows
