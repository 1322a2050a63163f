#include "cpu/forward.h"

#include <cmath>
#include <limits>

#include "cpu/isa.h"
#include "cpu/panel_forward.h"
#include "cpu/target.h"

namespace tvmf::cpu {
namespace {

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
  if constexpr (std::is_same_v<T, float>)
    if (call.own_products) return panel_forward(call, *call.own_products, out);

  Rows<T> input(call.head.input, N), weight(call.head.weight, plan.class_block);
  const Matrix<T> x = input.block(0, N);
  rnorm(x, saved.x_rnorm);
  std::vector<T> target_score(N);
  target_logits(call, x, weight, saved, target_score.data());
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
