#include "cpu/backward.h"

#include "cpu/isa.h"
#include "similarity.h"

namespace tvmf::cpu {
namespace {

// Uninitialised, of the sizes of its tensor, or [0] where it is not wanted.
Tensor empty_gradient(const Head& head, const OptionalTensor& of, bool wanted, ScalarType dtype) {
  return wanted ? empty(of->sizes(), dtype) : empty({0}, head.input.scalar_type());
}

// The weight's gradient is made in the weight's dtype, a block at a time; the others are made in
// the compute dtype.
template <class T>
Gradients empty_gradients(const Head& head, int64_t wanted) {
  const ScalarType weight_dtype = head.weight.scalar_type();
  return {
      .input = empty_gradient(head, head.input, wanted & kInput, kDtype<T>),
      .weight = populated(empty_gradient(head, head.weight, wanted & kWeight, weight_dtype)),
      .kappa = empty_gradient(head, head.kappa, wanted & kKappa, kDtype<T>),
      .scale = empty_gradient(head, head.scale, wanted & kScale, kDtype<T>),
      .bias = empty_gradient(head, head.bias, wanted & kBias, kDtype<T>),
  };
}

Gradients in_own_dtypes(const Head& head, Gradients gradients, int64_t wanted) {
  if (wanted & kInput) gradients.input = to_dtype(gradients.input, head.input.scalar_type());
  if (wanted & kKappa) gradients.kappa = to_dtype(gradients.kappa, head.kappa->scalar_type());
  if (wanted & kScale) gradients.scale = to_dtype(gradients.scale, head.scale->scalar_type());
  if (wanted & kBias) gradients.bias = to_dtype(gradients.bias, head.bias->scalar_type());
  return gradients;
}

// The factor of the row v in the projection of its gradient, dot / |v|^2, with its sign. A row
// shorter than eps is divided by a constant, and so has no projection.
template <class T>
T projection(T dot, T rnorm) {
  return rnorm < T(1 / kEps) ? -dot * rnorm * rnorm : T(0);
}

// What the tasks of one block sum: along rows for each stripe of columns, and along columns for
// each group of rows.
template <class T>
struct BlockSums {
  BlockSums(const Call<T>& call, bool of_classes)
      : width(call.plan.class_block),
        groups(ceil_div(call.N, call.plan.row_group)),
        row_dot(ceil_div(width, call.plan.stripe) * call.N),
        row_scale(row_dot.size()),
        col_dot(groups * width),
        col_bias(of_classes ? col_dot.size() : 0),
        col_kappa(col_bias.size()) {}

  // The tasks add to the sums along columns, and overwrite those along rows.
  void clear_columns() {
    for (auto* sums : {&col_dot, &col_bias, &col_kappa})
      std::fill(sums->begin(), sums->end(), T(0));
  }

  // Adds the groups' sums along `count` columns to those of the first group, always in order.
  void add_groups(int64_t count) {
    for (auto* sums : {&col_dot, &col_bias, &col_kappa})
      for (int64_t group = 1; !sums->empty() && group < groups; ++group)
        tile_kernels<T>().add(sums->data() + group * width, count, sums->data());
  }

  int64_t width;                                // the most columns of a block
  int64_t groups;                               // of rows
  std::vector<T> row_dot, row_scale;            // [stripes, N]
  std::vector<T> col_dot, col_bias, col_kappa;  // [groups, width]; the last two may be empty
};

template <class T>
class BackwardPass {
 public:
  BackwardPass(const Call<T>& call, const Saved<const T>& saved, const Upstream<T>& upstream,
               int64_t wanted, const Gradients& out)
      : call_(call),
        saved_(saved),
        upstream_(upstream),
        wanted_(wanted),
        out_(out),
        weight_(call.head.weight, call.plan.class_block),
        input_(call.head.input, call.N),
        x_(input_.block(0, call.N)),
        width_(call.plan.class_block),
        of_classes_(wanted & (kBias | kKappa)),
        block_terms_(call.terms, width_, upstream.with_sum),
        sums_(call, of_classes_),
        column_(call.N),
        row_dot_(call.N),
        factor_(width_),
        grad_tile_(empty({call.N * width_}, kDtype<T>)),
        grad_(data<T>(grad_tile_)) {}

  void run() {
    for (const Block& block : blocks_of(call_.C, saved_.kept, width_)) {
      const Matrix<T> w = weight_.block(block.begin, block.count);
      differentiate(block, w);
      add_up(block);
      if (of_classes_) class_gradients(block);
      const Matrix<T> tile{grad_, call_.N, block.count, block.stride};
      if (wanted_ & kWeight) weight_gradient(block, w, tile);
      if (wanted_ & kInput)
        matmul<T>({data<T>(out_.input), call_.N, call_.D, call_.D}, tile, w, block.begin > 0);
    }
    if (wanted_ & kInput) project_input();
    if ((wanted_ & kKappa) && call_.terms.kappa.size() == 1)
      data<T>(out_.kappa)[0] = T(total_kappa_);
    if (wanted_ & kScale) data<T>(out_.scale)[0] = T(total_scale_ * call_.terms.scale_derivative);
  }

 private:
  // Makes the block's gradient tile t_nc r_n q_c, and its sums along rows and columns. Products
  // that the forward pass did not keep are computed again, in the memory of the tile.
  void differentiate(const Block& block, const Matrix<T>& w) {
    const int64_t N = call_.N;
    block_columns(call_.label, block, column_.data());
    if (!block.kept) block_product(x_, w, block, grad_);
    sums_.clear_columns();
    const T* product = block.kept ? saved_.product + N * block.begin : grad_;
    const ClassTerms<T> class_terms =
        block_terms_.fill(block.begin, block.count, block.stride, saved_.weight_rnorm);
    Tasks(N, block.stride, call_.plan)
        .run([&](int64_t group, int64_t stripe, Range rows, Range cols) {
          const int64_t col = group * width_;
          kernels_.backward({.product = product,
                             .grad = grad_,
                             .stride = block.stride,
                             .x_rnorm = saved_.x_rnorm,
                             .column = column_.data(),
                             .max = saved_.max,
                             .sum_exp = saved_.sum_exp,
                             .gradient = upstream_.rows.data(),
                             .terms = class_terms,
                             .scale = call_.terms.scale,
                             .row_dot = &sums_.row_dot[stripe * N],
                             .row_scale = &sums_.row_scale[stripe * N],
                             .col_dot = &sums_.col_dot[col],
                             .col_bias = of_classes_ ? &sums_.col_bias[col] : nullptr,
                             .col_kappa = of_classes_ ? &sums_.col_kappa[col] : nullptr},
                            rows, cols);
        });
  }

  // Adds up what the tasks of a block summed, always in the same order.
  void add_up(const Block& block) {
    const int64_t N = call_.N, stripes = ceil_div(block.stride, call_.plan.stripe);
    for (int64_t stripe = 0; stripe < stripes; ++stripe) {
      for (int64_t n = 0; n < N; ++n) {
        row_dot_[n] += sums_.row_dot[stripe * N + n];
        total_scale_ += sums_.row_scale[stripe * N + n];
      }
    }
    sums_.add_groups(block.count);
  }

  // Writes the gradients of the block's biases and kappas, and adds to that of one kappa for all.
  void class_gradients(const Block& block) {
    const T scale = call_.terms.scale;
    const bool kappa_per_class = (wanted_ & kKappa) && call_.terms.kappa.size() > 1;
    for (int64_t i = 0; i < block.count; ++i) {
      total_kappa_ += double(scale) * sums_.col_kappa[i];
      if (wanted_ & kBias) data<T>(out_.bias)[block.begin + i] = scale * sums_.col_bias[i];
      if (kappa_per_class) data<T>(out_.kappa)[block.begin + i] = scale * sums_.col_kappa[i];
    }
  }

  // Writes the projection of the block's rows, and adds the product of tile and features to it.
  void weight_gradient(const Block& block, const Matrix<T>& w, const Matrix<T>& tile) {
    const int64_t D = call_.D;
    const bool direct = out_.weight.scalar_type() == kDtype<T>;
    if (!direct && !weight_part_) weight_part_ = empty({width_, D}, kDtype<T>);
    T* to = direct ? data<T>(out_.weight) + block.begin * D : data<T>(*weight_part_);
    for (int64_t i = 0; i < block.count; ++i)
      factor_[i] = projection(sums_.col_dot[i], saved_.weight_rnorm[block.begin + i]);
    parallel_rows(block.count, D, [&](int64_t begin, int64_t end) {
      kernels_.multiply(w.data + begin * w.row_stride, w.row_stride, &factor_[begin], end - begin,
                        D, to + begin * D);
    });
    matmul<T>({to, block.count, D, D}, tile.transposed(), x_, true);
    if (direct) return;
    Tensor rows = torch::stable::narrow(out_.weight, 0, block.begin, block.count);
    torch::stable::copy_(rows, torch::stable::narrow(*weight_part_, 0, 0, block.count));
  }

  void project_input() {
    const int64_t N = call_.N, D = call_.D;
    for (int64_t n = 0; n < N; ++n) row_dot_[n] = projection(row_dot_[n], saved_.x_rnorm[n]);
    T* to = data<T>(out_.input);
    parallel_rows(N, D, [&](int64_t begin, int64_t end) {
      kernels_.multiply_add(x_.data + begin * x_.row_stride, x_.row_stride, &row_dot_[begin],
                            end - begin, D, to + begin * D);
    });
  }

  const TileKernels<T>& kernels_ = tile_kernels<T>();
  const Call<T>& call_;
  const Saved<const T> saved_;
  const Upstream<T>& upstream_;
  const int64_t wanted_;
  Gradients out_;
  Rows<T> weight_, input_;
  const Matrix<T> x_;
  const int64_t width_;    // the most classes of a block
  const bool of_classes_;  // whether gradients of kappa or bias are wanted
  BlockTerms<T> block_terms_;
  BlockSums<T> sums_;
  std::vector<int64_t> column_;  // [N]  of each row's target in the block, or -1
  std::vector<T> row_dot_;       // [N]  over all blocks
  std::vector<T> factor_;        // [width]
  double total_kappa_ = 0, total_scale_ = 0;
  const Tensor grad_tile_;  // [N, width]
  T* const grad_;
  std::optional<Tensor> weight_part_;  // [width, D]  a block's gradient in the compute dtype
};

}  // namespace

template <class T>
Gradients backward(const Call<T>& call, const Saved<const T>& saved, const Upstream<T>& upstream,
                   int64_t wanted) {
  Gradients out = empty_gradients<T>(call.head, wanted);
  if (call.N > 0)
    BackwardPass<T>(call, saved, upstream, wanted, out).run();
  else
    for (Tensor* gradient : {&out.weight, &out.kappa, &out.scale, &out.bias})
      torch::stable::zero_(*gradient);
  return in_own_dtypes(call.head, out, wanted);
}

template Gradients backward(const Call<float>&, const Saved<const float>&, const Upstream<float>&,
                            int64_t);
template Gradients backward(const Call<double>&, const Saved<const double>&,
                            const Upstream<double>&, int64_t);

}  // namespace tvmf::cpu
