#include "cpu/panel_backward.h"

#include <limits>
#include <numeric>

#include "cpu/isa.h"
#include "cpu/panel_call.h"

namespace tvmf::cpu {
namespace {

// Upstream gradients of the samples, padded to whole panels.
struct SampleGradients {
  SampleGradients(const Call<float>& call, const Saved<const float>& saved,
                  const Upstream<float>& upstream)
      : others(round_up(call.N, kPanel)),
        sum(upstream.with_sum ? others.size() : 0),
        max(others.size()),
        score(others.size()) {
    for (int64_t n = 0; n < call.N; ++n) {
      // Where there is no other class, or all of them have a logit of -inf, the maximum is -inf and
      // the sum is 0.
      const bool none = saved.max[n] == -std::numeric_limits<float>::infinity();
      const RowGradient<float>& row = upstream.rows[n];
      max[n] = none ? 0 : saved.max[n];
      others[n] = saved.sum_exp[n] == 0 ? 0 : row.others / saved.sum_exp[n];
      score[n] = row.score;
      if (upstream.with_sum) sum[n] = row.sum;
    }
  }

  PanelGradients panel(int64_t p) const {
    const int64_t at = p * kPanel;
    return {&others[at], sum.empty() ? nullptr : &sum[at], &max[at], &score[at]};
  }

  std::vector<float> others, sum, max, score;
};

// What a block of classes adds to sums over all classes.
struct BlockTotals {
  std::vector<float> row_dot, row_scale;  // of each sample, padded to whole panels
  double kappa = 0;
};

// The rows of the weight's gradient that a wave writes. Where the weight is not float32 they are
// made in a buffer, and converted when all of them are there.
class WeightRows {
 public:
  WeightRows(const Tensor& gradient, int64_t wave) : gradient_(gradient), D_(gradient.size(1)) {
    if (!direct()) buffer_ = Buffer(wave * D_);
  }

  bool direct() const { return gradient_.scalar_type() == kDtype<float>; }
  float* row(int64_t begin, int64_t i) const {
    return (direct() ? data<float>(gradient_) + begin * D_ : buffer_.data()) + i * D_;
  }
  void finish(int64_t begin, int64_t count) const {
    if (direct()) return;
    const std::array<int64_t, 2> sizes{count, D_}, strides{D_, 1};
    const Tensor rows = torch::stable::from_blob(
        buffer_.data(), sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
        kDtype<float>);
    Tensor gradient = gradient_, to = torch::stable::narrow(gradient, 0, begin, count);
    torch::stable::copy_(to, rows);
  }

 private:
  const Tensor gradient_;
  const int64_t D_;
  Buffer buffer_;
};

class PanelBackward {
 public:
  PanelBackward(const Call<float>& call, const PanelKernels& kernels,
                const Saved<const float>& saved, const Upstream<float>& upstream, int64_t wanted,
                const Gradients& out)
      : call_(call),
        panel_call_(call, kernels),
        kernels_(kernels),
        saved_(saved),
        upstream_(upstream),
        wanted_(wanted),
        out_(out),
        block_(panel_call_.plan.block),
        wave_(panel_call_.plan.wave),
        panels_(panel_call_.panels),
        kept_classes_(panel_call_.kept_classes(saved.kept)),
        weight_(call.head.weight, wave_),
        gradients_(call, saved, upstream),
        x_rnorm_(padded(saved.x_rnorm, call.N)),
        width_(x_rnorm_.size()),
        totals_(wave_ / block_, {std::vector<float>(width_), std::vector<float>(width_)}),
        row_dot_(width_) {}

  void run() {
    if (kept_classes_ < call_.C) columns_ = panel_call_.columns_of_features();
    if (wanted_ & kWeight) rows_ = panel_call_.rows_of_features();
    if (wanted_ & kInput) {
      input_grad_ = Buffer(panel_call_.D_panels * width_ * kPanel);
      if (call_.C > kClassesPerSum) input_sum_ = Buffer(panel_call_.D_panels * width_ * kPanel);
    }
    const std::optional<WeightRows> weight_grad =
        wanted_ & kWeight ? std::optional<WeightRows>(std::in_place, out_.weight, wave_)
                          : std::nullopt;
    make_tile();
    make_slots();
    for (int64_t begin = 0; begin < call_.C; begin += wave_) {
      const int64_t count = std::min(wave_, call_.C - begin), blocks = ceil_div(count, block_);
      const Matrix<float> w = weight_.block(begin, count);
      run_tasks(blocks, panel_call_.slots, [&](int64_t slot, int64_t i) {
        const Classes classes{begin, i * block_, std::min(block_, count - i * block_)};
        make_block(slots_[slot], classes, w, totals_[i]);
        if (weight_grad) weight_gradient(slots_[slot], classes, w, *weight_grad);
      });
      for (int64_t i = 0; i < blocks; ++i) add_up(totals_[i]);
      if (weight_grad) weight_grad->finish(begin, count);
      if (wanted_ & kInput) input_gradient(w, begin);
    }
    if (wanted_ & kInput) project_input();
    if ((wanted_ & kKappa) && call_.terms.kappa.size() == 1)
      data<float>(out_.kappa)[0] = float(total_kappa_);
    if (wanted_ & kScale)
      data<float>(out_.scale)[0] = float(total_scale_ * call_.terms.scale_derivative);
  }

 private:
  // `count` classes from the one that is `first` in the wave, which begins at `wave`.
  struct Classes {
    int64_t wave, first, count;
    int64_t begin() const { return wave + first; }
  };

  // The memory of one thread.
  struct Slot {
    float* packed;   // the block's weights, where its products are made again
    float* product;  // [N / 16, block, 16] and
    float* grad;     // [block, 16], where elements of the tile are pairs
    float *lanes_dot, *lanes_bias, *lanes_kappa;  // [block, 16]
    float *col_dot, *col_bias, *col_kappa;        // [block]
    float* features;  // a piece of the weight or of its gradient, of kFeaturePanels
    BlockTerms<float> terms;
  };

  // The gradient of a wave in panels. One tile of floats serves both products. Pairs are summed
  // over in one direction, so that each product has a tile of its own.
  void make_tile() {
    tile_distance_ = wave_ * kPanel + kPanel;
    if (pairs()) {
      tile_ = Buffer(ceil_div(panels_, 2) * tile_distance_);
      tile_of_rows_distance_ = wave_ / 2 * kPanel + kPanel;
      tile_of_rows_ = Buffer(panels_ * tile_of_rows_distance_);
    } else {
      tile_of_rows_ = tile_ = Buffer(panels_ * tile_distance_);
      tile_of_rows_distance_ = tile_distance_;
    }
  }

  void make_slots() {
    const std::array<int64_t, 10> sizes{
        kept_classes_ < call_.C ? panel_call_.packed_size() : 0,
        pairs() ? panels_ * block_ * kPanel : 0,
        pairs() ? block_ * kPanel : 0,
        block_ * kPanel,
        block_ * kPanel,
        block_ * kPanel,
        block_,
        block_,
        block_,
        kFeaturePanels * std::max(panel_call_.packed_distance(block_),
                                  panel_call_.packed_distance(kClassDepth))};
    memory_ = Buffer(panel_call_.slots * std::accumulate(sizes.begin(), sizes.end(), int64_t(0)));
    float* next = memory_.data();
    for (int64_t i = 0; i < panel_call_.slots; ++i) {
      std::array<float*, sizes.size()> parts;
      for (size_t k = 0; k < sizes.size(); ++k) {
        parts[k] = next;
        next += sizes[k];
      }
      const auto [packed, product, grad, lanes_dot, lanes_bias, lanes_kappa, dot, bias, kappa,
                  features] = parts;
      slots_.push_back({packed, product, grad, lanes_dot, lanes_bias, lanes_kappa, dot, bias, kappa,
                        features, BlockTerms<float>(call_.terms, block_, upstream_.with_sum)});
    }
  }

  // Makes the gradient of a block, t_nc r_n q_c, and its sums along samples and classes.
  void make_block(Slot& slot, const Classes& classes, const Matrix<float>& w,
                  BlockTotals& totals) const {
    const int64_t count = classes.count;
    const int64_t kept_panels = find_products(slot, classes, w);
    const float* kept = saved_.product + call_.N * classes.begin();
    float* lanes[]{slot.lanes_dot, slot.lanes_bias, slot.lanes_kappa};
    for (float* sums : lanes)
      if (of_classes() || sums == slot.lanes_dot) std::fill_n(sums, count * kPanel, 0.f);
    const ClassTerms<float> terms =
        slot.terms.fill(classes.begin(), count, count, saved_.weight_rnorm);
    for (int64_t p = 0; p < panels_; ++p) {
      int32_t target[kPanel];
      panel_call_.targets(classes.begin(), count, p, target);
      float* made = made_product(slot, classes, p);
      float* grad = pairs() ? slot.grad : made;
      panel_call_.tile.backward({.product = p < kept_panels ? kept + p * count * kPanel : made,
                                 .grad = grad,
                                 .count = count,
                                 .terms = terms,
                                 .scale = call_.terms.scale,
                                 .x_rnorm = &x_rnorm_[p * kPanel],
                                 .target = target,
                                 .upstream = gradients_.panel(p),
                                 .gradient = &upstream_.rows[p * kPanel],
                                 .row_dot = &totals.row_dot[p * kPanel],
                                 .row_scale = &totals.row_scale[p * kPanel],
                                 .col_dot = slot.lanes_dot,
                                 .col_bias = of_classes() ? slot.lanes_bias : nullptr,
                                 .col_kappa = slot.lanes_kappa});
      if (pairs())
        kernels_.pack_pairs(
            grad, count,
            tile_.data() + p / 2 * tile_distance_ + classes.first * kPanel + p % 2 * (kPanel / 2),
            tile_of_rows_.data() + p * tile_of_rows_distance_ + classes.first / 2 * kPanel);
    }
    panel_call_.tile.add_lanes(slot.lanes_dot, count, slot.col_dot);
    if (of_classes()) class_gradients(slot, classes, totals);
  }

  // Where the products of a panel are made that the forward pass did not keep as they are needed.
  // Floats are made in the tile, where the gradient replaces them.
  float* made_product(const Slot& slot, const Classes& classes, int64_t p) const {
    return pairs() ? slot.product + p * classes.count * kPanel
                   : tile_.data() + p * tile_distance_ + classes.first * kPanel;
  }

  // Sees to it that the products of a block are there. Those of so many panels are where the
  // forward pass kept them, those of the others are `made_product`.
  int64_t find_products(const Slot& slot, const Classes& classes, const Matrix<float>& w) const {
    const int64_t count = classes.count, whole = panel_call_.whole_panels();
    if (classes.begin() < kept_classes_) {
      const int64_t columns = panel_call_.last_columns();
      const float* last = saved_.product + call_.N * classes.begin() + whole * count * kPanel;
      for (int64_t c = 0; columns > 0 && c < count; ++c) {
        float* row = made_product(slot, classes, whole) + c * kPanel;
        std::fill(std::copy_n(last + c * columns, columns, row), row + kPanel, 0.f);
      }
      return whole;
    }
    panel_call_.pack_weights({&w(classes.first, 0), count, call_.D, w.row_stride}, slot.packed);
    panel_call_.multiply(slot.packed, count, columns_, 0, panels_, made_product(slot, classes, 0),
                         made_product(slot, classes, 1) - made_product(slot, classes, 0));
    return 0;
  }

  // Writes the gradients of the block's biases and kappas, and adds up that of one kappa for all.
  void class_gradients(Slot& slot, const Classes& classes, BlockTotals& totals) const {
    panel_call_.tile.add_lanes(slot.lanes_bias, classes.count, slot.col_bias);
    panel_call_.tile.add_lanes(slot.lanes_kappa, classes.count, slot.col_kappa);
    const float scale = call_.terms.scale;
    const bool kappa_per_class = (wanted_ & kKappa) && call_.terms.kappa.size() > 1;
    totals.kappa = 0;
    for (int64_t i = 0; i < classes.count; ++i) {
      const int64_t c = classes.begin() + i;
      totals.kappa += double(scale) * slot.col_kappa[i];
      if (wanted_ & kBias) data<float>(out_.bias)[c] = scale * slot.col_bias[i];
      if (kappa_per_class) data<float>(out_.kappa)[c] = scale * slot.col_kappa[i];
    }
  }

  // Adds a block's sums to those of all classes, always in the order of blocks.
  void add_up(const BlockTotals& totals) {
    for (int64_t n = 0; n < call_.N; ++n) {
      row_dot_[n] += totals.row_dot[n];
      total_scale_ += totals.row_scale[n];
    }
    total_kappa_ += totals.kappa;
  }

  // The product of the block's gradient with the features, and the projection of its rows.
  void weight_gradient(const Slot& slot, const Classes& classes, const Matrix<float>& w,
                       const WeightRows& out) const {
    const int64_t D = call_.D, b_distance = panel_call_.N_elements * kPanel;
    const int64_t distance = panel_call_.packed_distance(classes.count);
    for (int64_t i = 0; i < classes.count; ++i)
      slot.col_dot[i] = projection(slot.col_dot[i], saved_.weight_rnorm[classes.begin() + i]);
    for (int64_t j = 0; j < panel_call_.D_panels; j += kFeaturePanels) {
      kernels_.multiply({.rows = classes.count,
                         .panels = std::min(kFeaturePanels, panel_call_.D_panels - j),
                         .depth = panel_call_.N_elements,
                         .a = tile_.data() + classes.first * kPanel,
                         .a_distance = tile_distance_,
                         .b = rows_.data() + j * b_distance,
                         .b_distance = b_distance,
                         .out = slot.features,
                         .out_distance = distance,
                         .add = false});
      const int64_t d = j * kPanel;
      panel_call_.tile.unpack({.count = classes.count,
                               .cols = std::min(kFeaturePanels * kPanel, D - d),
                               .panels = slot.features,
                               .distance = distance,
                               .other = &w(classes.first, d),
                               .other_stride = w.row_stride,
                               .factor = slot.col_dot,
                               .out = out.row(classes.wave, classes.first) + d,
                               .out_stride = D,
                               .past_caches = out.direct()});
    }
  }

  // Adds the product of a wave's gradient with its weights to that of the waves before. Every sum
  // runs over the classes in order, whatever the number of tasks.
  void input_gradient(const Matrix<float>& w, int64_t wave) {
    const int64_t slots = panel_call_.slots, D_panels = panel_call_.D_panels;
    const int64_t groups = std::min(round_up(ceil_div(D_panels, kFeaturePanels), slots),
                                    ceil_div(D_panels, 3)),
                  shares = std::min(panels_, ceil_div(slots, groups));
    run_tasks(groups * shares, slots, [&](int64_t slot, int64_t i) {
      const int64_t group = i / shares, share = i % shares;
      input_gradient(slots_[slot], w, wave,
                     {D_panels * group / groups, D_panels * (group + 1) / groups},
                     {panels_ * share / shares, panels_ * (share + 1) / shares});
    });
  }

  void input_gradient(const Slot& slot, const Matrix<float>& w, int64_t wave, Range features,
                      Range samples) const {
    const int64_t per = kernels_.per_element, rows = (samples.end - samples.begin) * kPanel;
    for (int64_t j = features.begin; j < features.end; j += kFeaturePanels) {
      const int64_t count = std::min(kFeaturePanels, features.end - j), d = j * kPanel;
      for (int64_t begin = 0; begin < w.rows; begin += kClassDepth) {
        const int64_t classes = std::min(kClassDepth, w.rows - begin);
        const int64_t elements = ceil_div(classes, per), distance = elements * kPanel + kPanel;
        const bool first = (wave + begin) % kClassesPerSum == 0;
        if (first && wave + begin > 0)
          for (int64_t i = j; i < j + count; ++i)
            end_sum(wave + begin, (i * width_ + samples.begin * kPanel) * kPanel, rows * kPanel);
        for (int64_t k = 0; k < elements; ++k)
          kernels_.pack_rows(&w(begin + k * per, d), w.row_stride, std::min(per, classes - k * per),
                             std::min(count * kPanel, call_.D - d), slot.features + k * kPanel,
                             distance);
        kernels_.multiply_transposed(
            {.rows = rows,
             .panels = count,
             .depth = elements,
             .a = tile_of_rows_.data() + samples.begin * tile_of_rows_distance_ +
                  begin / per * kPanel,
             .a_distance = tile_of_rows_distance_,
             .b = slot.features,
             .b_distance = distance,
             .out = input_grad_.data() + (j * width_ + samples.begin * kPanel) * kPanel,
             .out_distance = width_ * kPanel,
             .add = !first});
      }
    }
  }

  // A sum of the features' gradient ends before the class `end`: `size` of its numbers, the first
  // at `from`, are added to the sums that ended before it. The first sum finds none, and is copied.
  void end_sum(int64_t end, int64_t from, int64_t size) const {
    const float* sum = input_grad_.data() + from;
    float* total = input_sum_.data() + from;
    for (int64_t i = 0; i < size; ++i)
      total[i] = end == kClassesPerSum ? sum[i] : total[i] + sum[i];
  }

  void project_input() {
    const Matrix<float>& x = panel_call_.x;
    std::vector<float> factor(call_.N);
    for (int64_t n = 0; n < call_.N; ++n)
      factor[n] = projection(float(row_dot_[n]), saved_.x_rnorm[n]);
    parallel_rows(call_.N, call_.D, [&](int64_t begin, int64_t end) {
      if (input_sum_.data())
        for (int64_t i = 0; i < panel_call_.D_panels; ++i)
          end_sum(call_.C, (i * width_ + begin) * kPanel, (end - begin) * kPanel);
      panel_call_.tile.unpack(
          {.count = end - begin,
           .cols = call_.D,
           .panels = (input_sum_.data() ? input_sum_ : input_grad_).data() + begin * kPanel,
           .distance = width_ * kPanel,
           .other = &x(begin, 0),
           .other_stride = x.row_stride,
           .factor = &factor[begin],
           .out = data<float>(out_.input) + begin * call_.D,
           .out_stride = call_.D,
           .past_caches = false});
    });
  }

  bool pairs() const { return kernels_.per_element > 1; }
  bool of_classes() const { return wanted_ & (kBias | kKappa); }

  const Call<float>& call_;
  const PanelCall panel_call_;
  const PanelKernels& kernels_;
  const Saved<const float> saved_;
  const Upstream<float>& upstream_;
  const int64_t wanted_;
  const Gradients& out_;
  const int64_t block_, wave_, panels_;
  const int64_t kept_classes_;
  Rows<float> weight_;
  const SampleGradients gradients_;
  const std::vector<float> x_rnorm_;
  const int64_t width_;              // samples, padded to whole panels
  std::vector<BlockTotals> totals_;  // of each block in a wave
  std::vector<double> row_dot_;      // [N]  over all classes
  double total_kappa_ = 0, total_scale_ = 0;
  Buffer columns_, rows_, tile_, tile_of_rows_, input_grad_, input_sum_, memory_;
  int64_t tile_distance_, tile_of_rows_distance_;
  std::vector<Slot> slots_;
};

}  // namespace

void panel_backward(const Call<float>& call, const PanelKernels& kernels,
                    const Saved<const float>& saved, const Upstream<float>& upstream,
                    int64_t wanted, const Gradients& out) {
  PanelBackward(call, kernels, saved, upstream, wanted, out).run();
}

}  // namespace tvmf::cpu
