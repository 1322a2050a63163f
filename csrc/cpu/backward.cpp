// The gradients of the head's tensors from those of the row statistics, a block of classes at a
// time.
#include "cpu/passes.h"
#include "similarity.h"

namespace tvmf {
namespace {

// A gradient that is still to be filled: of the size of its tensor, or [0] where it is not wanted.
Tensor empty_gradient(const Head& head, const std::optional<Tensor>& of, bool wanted,
                      ScalarType dtype) {
  if (!wanted) return empty({0}, head.input.scalar_type());
  return empty(of->sizes(), dtype);
}

// Converts each wanted gradient to the dtype of its tensor; that of the weight has it already.
Gradients in_own_dtypes(const Head& head, Gradients out, int64_t wanted) {
  if (wanted & kInput) out.input = to_dtype(out.input, head.input.scalar_type());
  if (wanted & kKappa) out.kappa = to_dtype(out.kappa, head.kappa->scalar_type());
  if (wanted & kScale) out.scale = to_dtype(out.scale, head.scale->scalar_type());
  if (wanted & kBias) out.bias = to_dtype(out.bias, head.bias->scalar_type());
  return out;
}

}  // namespace

template <class T>
Gradients make_gradients(const Problem<T>& problem, const T* saved, int64_t kept,
                         const RowUpstream<T>& upstream, bool with_sum, int64_t wanted) {
  const auto& k = tile_kernels<T>();
  const int64_t N = problem.N, C = problem.C, D = problem.D;
  const Head& head = problem.head;
  const CpuPlan& plan = problem.plan;
  const Terms<T>& terms = problem.terms;
  const std::vector<int64_t>& label = problem.label;
  const SavedLayout layout(N, C, kept);
  const T *target_product = saved + layout.target_product, *x_rnorm = saved + layout.x_rnorm;
  const T* weight_rnorm = saved + layout.weight_rnorm;
  const bool class_sums = (wanted & kBias) || (wanted & kKappa);
  const ScalarType weight_dtype = head.weight.scalar_type();
  const bool weight_direct = weight_dtype == kDtype<T>;
  const T scale = terms.scale;

  Gradients out{empty_gradient(head, head.input, wanted & kInput, kDtype<T>),
                populated(empty_gradient(head, head.weight, wanted & kWeight, weight_dtype)),
                empty_gradient(head, head.kappa, wanted & kKappa, kDtype<T>),
                empty_gradient(head, head.scale, wanted & kScale, kDtype<T>),
                empty_gradient(head, head.bias, wanted & kBias, kDtype<T>)};
  if (N == 0) {
    for (Tensor* gradient : {&out.weight, &out.kappa, &out.scale, &out.bias})
      torch::stable::zero_(*gradient);
    return in_own_dtypes(head, out, wanted);
  }
  T *grad_input = data<T>(out.input), *grad_kappa = data<T>(out.kappa);
  T* grad_bias = data<T>(out.bias);
  double total_kappa = 0, total_scale = 0;

  Rows<T> input(head.input, N), weight(head.weight, plan.class_block);
  const Matrix<T> x = input.block(0, N);
  const int64_t groups = ceil_div(N, plan.row_group);
  const int64_t stripes = ceil_div(plan.class_block, plan.stripe);

  std::vector<int64_t> column(N);
  std::vector<T> row_dot(N), part_row_dot(stripes * N), part_row_scale(stripes * N);
  std::vector<T> col_dot(groups * plan.class_block), factor(plan.class_block);
  std::vector<T> col_bias(class_sums ? groups * plan.class_block : 0), col_kappa(col_bias.size());
  BlockTerms<T> block_terms(terms, plan.class_block, with_sum);
  const Tensor grad_tile = empty({N * plan.class_block}, kDtype<T>);
  T* grad = data<T>(grad_tile);
  std::optional<Tensor> weight_part;

  for (const Block& block : blocks_of(C, kept, plan.class_block)) {
    // Multiply again where the forward pass did not keep the products.
    const Matrix<T> w = weight.block(block.begin, block.count);
    const T* product = block.kept ? saved + layout.product + N * block.begin : grad;
    block_labels(label, block, column.data());
    if (!block.kept) block_product(x, w, block, column.data(), target_product, grad);

    // Differentiate: make the tile t_nc r_n q_c, and its sums along rows and columns.
    std::fill(col_dot.begin(), col_dot.end(), T(0));
    std::fill(col_bias.begin(), col_bias.end(), T(0));
    std::fill(col_kappa.begin(), col_kappa.end(), T(0));
    const ClassTerms<T> class_terms =
        block_terms.fill(block.begin, block.count, block.ld, weight_rnorm);
    const Tasks tasks{N, block.ld, plan};
    tasks.run([&](int64_t group, int64_t stripe, Range rows, Range cols) {
      const int64_t col = group * plan.class_block;
      k.backward({.product = product,
                  .grad = grad,
                  .ld = block.ld,
                  .x_rnorm = x_rnorm,
                  .label = column.data(),
                  .max = saved + layout.max,
                  .sum_exp = saved + layout.sum_exp,
                  .grad_lse = upstream.lse.data(),
                  .grad_target = upstream.target.data(),
                  .grad_sum = upstream.sum.data(),
                  .terms = class_terms,
                  .scale = scale,
                  .row_dot = &part_row_dot[stripe * N],
                  .row_scale = &part_row_scale[stripe * N],
                  .col_dot = &col_dot[col],
                  .col_bias = class_sums ? &col_bias[col] : nullptr,
                  .col_kappa = class_sums ? &col_kappa[col] : nullptr},
                 rows, cols);
    });
    for (int64_t stripe = 0; stripe < tasks.stripes; ++stripe) {
      for (int64_t n = 0; n < N; ++n) {
        row_dot[n] += part_row_dot[stripe * N + n];
        total_scale += part_row_scale[stripe * N + n];
      }
    }
    for (int64_t group = 1; group < groups; ++group) {
      const int64_t col = group * plan.class_block;
      k.add(&col_dot[col], block.count, col_dot.data());
      if (class_sums) {
        k.add(&col_bias[col], block.count, col_bias.data());
        k.add(&col_kappa[col], block.count, col_kappa.data());
      }
    }
    for (int64_t i = 0; class_sums && i < block.count; ++i) {
      total_kappa += double(scale) * col_kappa[i];
      if (wanted & kBias) grad_bias[block.begin + i] = scale * col_bias[i];
      if ((wanted & kKappa) && terms.kappa.size() > 1)
        grad_kappa[block.begin + i] = scale * col_kappa[i];
    }

    // Multiply. The weight gradient of the block is added to its projection, and the block's part
    // of the input gradient to those of the blocks before.
    const Matrix<T> tile{grad, N, block.count, block.ld};
    if (wanted & kWeight) {
      if (!weight_direct && !weight_part) weight_part = empty({plan.class_block, D}, kDtype<T>);
      T* to = weight_direct ? data<T>(out.weight) + block.begin * D : data<T>(*weight_part);
      for (int64_t i = 0; i < block.count; ++i) {
        const T q = weight_rnorm[block.begin + i];
        factor[i] = q < T(1 / kEps) ? -col_dot[i] * q * q : T(0);
      }
      parallel_rows(block.count, D, [&](int64_t begin, int64_t end) {
        k.multiply(w.data + begin * w.row_stride, w.row_stride, &factor[begin], end - begin, D,
                   to + begin * D);
      });
      matmul<T>({to, block.count, D, D}, tile.transposed(), x, true);
      if (!weight_direct) {
        Tensor rows = torch::stable::narrow(out.weight, 0, block.begin, block.count);
        torch::stable::copy_(rows, torch::stable::narrow(*weight_part, 0, 0, block.count));
      }
    }
    if (wanted & kInput) matmul<T>({grad_input, N, D, D}, tile, w, block.begin > 0);
  }

  if (wanted & kInput) {
    for (int64_t n = 0; n < N; ++n)
      row_dot[n] = x_rnorm[n] < T(1 / kEps) ? -row_dot[n] * x_rnorm[n] * x_rnorm[n] : T(0);
    parallel_rows(N, D, [&](int64_t begin, int64_t end) {
      k.multiply_add(x.data + begin * x.row_stride, x.row_stride, &row_dot[begin], end - begin, D,
                     grad_input + begin * D);
    });
  }
  if ((wanted & kKappa) && terms.kappa.size() == 1) grad_kappa[0] = T(total_kappa);
  if (wanted & kScale) data<T>(out.scale)[0] = T(total_scale * terms.dscale);
  return in_own_dtypes(head, out, wanted);
}

template Gradients make_gradients(const Problem<float>&, const float*, int64_t,
                                  const RowUpstream<float>&, bool, int64_t);
template Gradients make_gradients(const Problem<double>&, const double*, int64_t,
                                  const RowUpstream<double>&, bool, int64_t);

}  // namespace tvmf
