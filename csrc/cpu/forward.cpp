// Products of blocks of classes become statistics of the rows.
#include "cpu/passes.h"

namespace tvmf {
namespace {

// Makes each row's product with the weight of its target, and the target's score phi + bias. They
// are known before the blocks are multiplied, so that one pass over the blocks can count ranks.
template <class T>
void target_scores(const Problem<T>& problem, const Matrix<T>& x, Rows<T>& weight, const T* x_rnorm,
                   T* product, T* score) {
  constexpr int64_t kGather = 256;
  const auto& k = tile_kernels<T>();
  const int64_t N = problem.N, C = problem.C, D = problem.D;
  const Head& head = problem.head;
  const Terms<T>& terms = problem.terms;
  const std::vector<int64_t>& label = problem.label;
  std::vector<int64_t> row(N);
  for (int64_t begin = 0; begin < N; begin += kGather) {
    const int64_t count = std::min(kGather, N - begin);
    Matrix<T> w;
    Tensor gathered;
    for (int64_t n = begin; n < begin + count; ++n) row[n] = std::max<int64_t>(label[n], 0);
    if (weight.direct()) {
      w = weight.block(0, C);
    } else {
      const std::array<int64_t, 1> sizes{count}, strides{1};
      const Tensor index = torch::stable::from_blob(
          row.data() + begin, sizes, strides,
          torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Long);
      gathered = to_dtype(call_dispatcher("aten::index_select", "", head.weight, int64_t(0), index),
                          kDtype<T>);
      w = {data<T>(gathered), count, D, D};
      for (int64_t i = 0; i < count; ++i) row[begin + i] = i;
    }
    parallel_rows(count, D, [&](int64_t first, int64_t last) {
      for (int64_t n = begin + first; n < begin + last; ++n) {
        const int64_t c = std::max<int64_t>(label[n], 0);
        const T kappa = terms.kappa[c], bias = terms.bias[c];
        T w_rnorm;
        k.rnorm(w.data + row[n] * w.row_stride, w.row_stride, 1, D, &w_rnorm);
        k.dot(x.data + n * x.row_stride, x.row_stride, w.data, w.row_stride, &row[n], 1, D,
              &product[n]);
        k.score(&product[n], &x_rnorm[n], &w_rnorm, &kappa, &bias, 1, &score[n]);
      }
    });
  }
}

}  // namespace

template <class T>
void make_statistics(const Problem<T>& problem, bool with_sum, int64_t kept, T* saved, T* target,
                     T* sum, int64_t* rank) {
  const auto& k = tile_kernels<T>();
  const int64_t N = problem.N, C = problem.C;
  const Head& head = problem.head;
  const CpuPlan& plan = problem.plan;
  const Terms<T>& terms = problem.terms;
  const std::vector<int64_t>& label = problem.label;
  const SavedLayout layout(N, C, kept);
  T *saved_max = saved + layout.max, *saved_sum_exp = saved + layout.sum_exp;
  T *target_product = saved + layout.target_product, *x_rnorm = saved + layout.x_rnorm;
  T* weight_rnorm = saved + layout.weight_rnorm;
  if (N == 0) {
    std::fill(saved, saved + layout.size, T(0));
    return;
  }

  Rows<T> input(head.input, N), weight(head.weight, plan.class_block);
  const Matrix<T> x = input.block(0, N);
  rnorm(x, x_rnorm);

  const int64_t stripes = ceil_div(plan.class_block, plan.stripe);
  std::fill(weight_rnorm + C, saved + layout.product, T(0));
  std::vector<T> target_score(N);
  std::vector<T> running_max(N, -std::numeric_limits<T>::infinity()), running_sum_exp(N);
  std::vector<T> part_max(stripes * N), part_sum_exp(stripes * N), part_sum(stripes * N);
  std::vector<int64_t> part_rank(stripes * N), column(N);
  target_scores(problem, x, weight, x_rnorm, target_product, target_score.data());
  std::fill(target, target + N, T(0));
  std::fill(sum, sum + (with_sum ? N : 0), T(0));
  std::fill(rank, rank + N, 0);

  BlockTerms<T> block_terms(terms, plan.class_block, with_sum);
  std::optional<Tensor> scratch;
  for (const Block& block : blocks_of(C, kept, plan.class_block)) {
    // Multiply. The products are kept for the backward pass, or else go to the one scratch tile.
    const Matrix<T> w = weight.block(block.begin, block.count);
    rnorm(w, weight_rnorm + block.begin);
    if (!block.kept && !scratch) scratch = empty({N * plan.class_block}, kDtype<T>);
    T* product = block.kept ? saved + layout.product + N * block.begin : data<T>(*scratch);
    block_labels(label, block, column.data());
    block_product(x, w, block, column.data(), target_product, product);

    // Reduce each stripe of columns to partial statistics.
    const ClassTerms<T> class_terms =
        block_terms.fill(block.begin, block.count, block.ld, weight_rnorm);
    const Tasks tasks{N, block.ld, plan};
    tasks.run([&](int64_t, int64_t stripe, Range rows, Range cols) {
      k.forward({.product = product,
                 .ld = block.ld,
                 .count = block.count,
                 .x_rnorm = x_rnorm,
                 .label = column.data(),
                 .target_score = target_score.data(),
                 .terms = class_terms,
                 .scale = terms.scale,
                 .max = &part_max[stripe * N],
                 .sum_exp = &part_sum_exp[stripe * N],
                 .sum = &part_sum[stripe * N],
                 .rank = &part_rank[stripe * N],
                 .target = target},
                rows, cols);
    });

    // Merge the stripes into the running statistics, always in the order of classes.
    for (int64_t stripe = 0; stripe < tasks.stripes; ++stripe) {
      for (int64_t n = 0; n < N; ++n) {
        const T part = part_max[stripe * N + n], old = running_max[n], max = std::max(old, part);
        const T keep_old = old == max ? T(1) : std::exp(old - max);
        const T keep_part = part == max ? T(1) : std::exp(part - max);
        running_max[n] = max;
        running_sum_exp[n] =
            running_sum_exp[n] * keep_old + part_sum_exp[stripe * N + n] * keep_part;
        rank[n] += part_rank[stripe * N + n];
        if (with_sum) sum[n] += part_sum[stripe * N + n];
      }
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    saved_max[n] = running_max[n];
    saved_sum_exp[n] = running_sum_exp[n];
    rank[n] = label[n] < 0 ? -1 : std::min(rank[n], C - 1);
  }
}

template void make_statistics(const Problem<float>&, bool, int64_t, float*, float*, float*,
                              int64_t*);
template void make_statistics(const Problem<double>&, bool, int64_t, double*, double*, double*,
                              int64_t*);

}  // namespace tvmf
