#include "cpu/forward.h"

#include <cmath>
#include <limits>

#include "cpu/isa.h"

namespace tvmf::cpu {
namespace {

// For each row the cosine and the logit of its target, and the target's score phi + bias before the
// margins. They come before the blocks of classes, so that the rank is counted in the same pass as
// the other statistics.
template <class T>
void target_logits(const Call<T>& call, const Matrix<T>& x, Rows<T>& weight, const Saved<T>& saved,
                   T* score) {
  constexpr int64_t kGathered = 256;  // rows of the weight that are converted together
  const auto& kernels = tile_kernels<T>();
  const int64_t N = call.N, D = call.D;
  std::vector<int64_t> row(N);  // of the target's weight, in the matrix `w`
  for (int64_t begin = 0; begin < N; begin += kGathered) {
    const int64_t count = std::min(kGathered, N - begin);
    Matrix<T> w;
    Tensor gathered;
    for (int64_t n = begin; n < begin + count; ++n) row[n] = std::max<int64_t>(call.label[n], 0);
    if (weight.direct()) {
      w = weight.block(0, call.C);
    } else {
      gathered = weight.gathered(row.data() + begin, count);
      w = {data<T>(gathered), count, D, D};
      for (int64_t i = 0; i < count; ++i) row[begin + i] = i;
    }
    parallel_rows(count, D, [&](int64_t first, int64_t last) {
      for (int64_t n = begin + first; n < begin + last; ++n) {
        const int64_t y = call.label[n];
        saved.target_cosine[n] = saved.target_logit[n] = score[n] = 0;
        if (y < 0) continue;
        const T* target_weight = w.data + row[n] * w.row_stride;
        const auto [product, cosine] = kernels.target(x.data + n * x.row_stride, target_weight, D);
        saved.target_cosine[n] = T(cosine);
        saved.target_logit[n] = T(target_logit(cosine, call.terms.of_target(y)).value);
        T weight_rnorm;
        kernels.rnorm(target_weight, w.row_stride, 1, D, &weight_rnorm);
        score[n] = kernels.score(T(product), saved.x_rnorm[n], weight_rnorm, call.terms.kappa[y],
                                 call.terms.bias[y]);
      }
    });
  }
}

// The statistics of each stripe of a block's columns, [stripes, N] each.
template <class T>
struct StripeStatistics {
  StripeStatistics(int64_t stripes, int64_t N)
      : N(N), max(stripes * N), sum_exp(stripes * N), sum(stripes * N), rank(stripes * N) {}

  // Adds the stripes of one block to the statistics of the row, always in the order of classes.
  void merge_into(const Statistics<T>& out, int64_t stripes) const {
    for (int64_t stripe = 0; stripe < stripes; ++stripe) {
      for (int64_t n = 0; n < N; ++n) {
        const int64_t at = stripe * N + n;
        const T old = out.saved.max[n], largest = std::max(old, max[at]);
        const T keep_old = old == largest ? T(1) : std::exp(old - largest);
        const T keep_new = max[at] == largest ? T(1) : std::exp(max[at] - largest);
        out.saved.max[n] = largest;
        out.saved.sum_exp[n] = out.saved.sum_exp[n] * keep_old + sum_exp[at] * keep_new;
        out.rank[n] += rank[at];
        if (out.sum) out.sum[n] += sum[at];
      }
    }
  }

  int64_t N;
  std::vector<T> max, sum_exp, sum;
  std::vector<int64_t> rank;
};

}  // namespace

template <class T>
void forward(const Call<T>& call, const Statistics<T>& out) {
  const int64_t N = call.N, C = call.C;
  const CpuPlan& plan = call.plan;
  const Saved<T>& saved = out.saved;
  if (N == 0) {
    std::fill(saved.weight_rnorm, saved.product, T(0));
    return;
  }
  std::fill(saved.weight_rnorm + C, saved.product, T(0));  // the padding

  Rows<T> input(call.head.input, N), weight(call.head.weight, plan.class_block);
  const Matrix<T> x = input.block(0, N);
  rnorm(x, saved.x_rnorm);
  std::vector<T> target_score(N);
  target_logits(call, x, weight, saved, target_score.data());
  if (call.head.target_score) {
    const int64_t stride = call.head.target_score->stride(0);
    const T* given = data<T>(*call.head.target_score);
    for (int64_t n = 0; n < N; ++n) target_score[n] = given[n * stride];
  }
  std::fill(saved.max, saved.max + N, -std::numeric_limits<T>::infinity());
  std::fill(saved.sum_exp, saved.sum_exp + N, T(0));
  std::fill(out.rank, out.rank + N, 0);
  if (out.sum) std::fill(out.sum, out.sum + N, T(0));

  StripeStatistics<T> stripes(ceil_div(plan.class_block, plan.stripe), N);
  BlockTerms<T> block_terms(call.terms, plan.class_block, out.sum);
  std::vector<int64_t> column(N);
  std::optional<Tensor> scratch;  // the products of a block that keeps none
  for (const Block& block : blocks_of(C, saved.kept, plan.class_block)) {
    const Matrix<T> w = weight.block(block.begin, block.count);
    rnorm(w, saved.weight_rnorm + block.begin);
    if (!block.kept && !scratch) scratch = empty({N * plan.class_block}, kDtype<T>);
    T* product = block.kept ? saved.product + N * block.begin : data<T>(*scratch);
    block_columns(call.label, block, column.data());
    block_product(x, w, block, product);

    const ClassTerms<T> class_terms =
        block_terms.fill(block.begin, block.count, block.stride, saved.weight_rnorm);
    const Tasks tasks(N, block.stride, plan);
    tasks.run([&](int64_t, int64_t stripe, Range rows, Range cols) {
      tile_kernels<T>().forward({.product = product,
                                 .stride = block.stride,
                                 .count = block.count,
                                 .x_rnorm = saved.x_rnorm,
                                 .column = column.data(),
                                 .target_score = target_score.data(),
                                 .terms = class_terms,
                                 .scale = call.terms.scale,
                                 .max = &stripes.max[stripe * N],
                                 .sum_exp = &stripes.sum_exp[stripe * N],
                                 .sum = &stripes.sum[stripe * N],
                                 .rank = &stripes.rank[stripe * N]},
                                rows, cols);
    });
    stripes.merge_into(out, tasks.stripes);
  }
  for (int64_t n = 0; n < N; ++n)
    if (call.label[n] == kIgnored) out.rank[n] = -1;
}

template void forward(const Call<float>&, const Statistics<float>&);
template void forward(const Call<double>&, const Statistics<double>&);

}  // namespace tvmf::cpu
