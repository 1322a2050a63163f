#include "cpu/panel_forward.h"

#include <cmath>
#include <limits>

#include "cpu/isa.h"
#include "cpu/panel_call.h"
#include "cpu/target.h"

namespace tvmf::cpu {
namespace {

// Statistics of all samples, one after another and padded to whole panels.
class SampleStatistics {
 public:
  SampleStatistics(int64_t width, bool with_sum)
      : values_((with_sum ? 3 : 2) * width), rank_(width), width_(width), with_sum_(with_sum) {}

  PanelStatistics panel(int64_t p) {
    float* max = values_.data() + p * kPanel;
    return {.max = max,
            .sum_exp = max + width_,
            .sum = with_sum_ ? max + 2 * width_ : nullptr,
            .rank = rank_.data() + p * kPanel};
  }

 private:
  std::vector<float> values_;
  std::vector<int32_t> rank_;
  int64_t width_;
  bool with_sum_;
};

class PanelForward {
 public:
  PanelForward(const Call<float>& call, const PanelKernels& kernels, const Statistics<float>& out)
      : call_(call),
        panel_call_(call, kernels),
        out_(out),
        kept_classes_(panel_call_.kept_classes(out.saved.kept)),
        weight_(call.head.weight, panel_call_.plan.wave),
        target_score_(round_up(call.N, kPanel)),
        blocks_(panel_call_.plan.wave / panel_call_.plan.block,
                SampleStatistics(target_score_.size(), out.sum)),
        total_(target_score_.size(), out.sum) {}

  void run() {
    rnorm(panel_call_.x, out_.saved.x_rnorm);
    target_logits(call_, panel_call_.x, weight_, out_.saved, target_score_.data());
    x_rnorm_ = padded(out_.saved.x_rnorm, call_.N);
    columns_ = panel_call_.columns_of_features();
    make_slots();
    for (int64_t p = 0; p < panel_call_.panels; ++p)
      std::fill_n(total_.panel(p).max, kPanel, -std::numeric_limits<float>::infinity());

    const Saved<float>& saved = out_.saved;
    std::fill(saved.product + call_.N * kept_classes_, saved.product + call_.N * saved.kept, 0.f);
    const auto [block, wave] = panel_call_.plan;
    for (int64_t begin = 0; begin < call_.C; begin += wave) {
      const int64_t count = std::min(wave, call_.C - begin);
      const Matrix<float> w = weight_.block(begin, count);
      run_tasks(ceil_div(count, block), panel_call_.slots, [&](int64_t slot, int64_t i) {
        const int64_t first = i * block;
        make_block(slots_[slot], begin + first,
                   {&w(first, 0), std::min(block, count - first), call_.D, w.row_stride},
                   blocks_[i]);
      });
      for (int64_t i = 0; i < ceil_div(count, block); ++i)
        for (int64_t p = 0; p < panel_call_.panels; ++p)
          panel_call_.tile.merge(blocks_[i].panel(p), total_.panel(p));
    }
    write();
  }

 private:
  // The memory of one thread.
  struct Slot {
    float *packed, *product, *logits;
    BlockTerms<float> terms;
  };

  void make_slots() {
    const int64_t block = panel_call_.plan.block, packed = panel_call_.packed_size();
    const int64_t product = panel_call_.panels * block * kPanel;
    const int64_t size = packed + product + block * kPanel;
    memory_ = Buffer(panel_call_.slots * size);
    for (int64_t i = 0; i < panel_call_.slots; ++i) {
      float* memory = memory_.data() + i * size;
      slots_.push_back({memory, memory + packed, memory + packed + product,
                        BlockTerms<float>(call_.terms, block, out_.sum)});
    }
  }

  // The products and statistics of the classes from `begin` on, of which `w` are the weights.
  void make_block(Slot& slot, int64_t begin, const Matrix<float>& w, SampleStatistics& out) {
    const int64_t count = w.rows, panels = panel_call_.panels;
    const Saved<float>& saved = out_.saved;
    tile_kernels<float>().rnorm(w.data, w.row_stride, count, call_.D, saved.weight_rnorm + begin);
    panel_call_.pack_weights(w, slot.packed);

    // The last panel of products that are kept would be wider than its samples, and is packed.
    const int64_t distance = count * kPanel;
    const bool kept = begin < kept_classes_;
    const int64_t in_place = kept ? panel_call_.whole_panels() : 0;
    float* kept_product = saved.product + call_.N * begin;
    panel_call_.multiply(slot.packed, count, columns_, 0, in_place, kept_product, distance);
    panel_call_.multiply(slot.packed, count, columns_, in_place, panels,
                         slot.product + in_place * distance, distance);
    if (in_place < panels && kept)
      for (int64_t c = 0; c < count; ++c)
        std::copy_n(slot.product + in_place * distance + c * kPanel, panel_call_.last_columns(),
                    kept_product + in_place * distance + c * panel_call_.last_columns());

    const ClassTerms<float> terms = slot.terms.fill(begin, count, count, saved.weight_rnorm);
    for (int64_t p = 0; p < panels; ++p) {
      int32_t target[kPanel];
      panel_call_.targets(begin, count, p, target);
      panel_call_.tile.forward(
          {.product = (p < in_place ? kept_product : slot.product) + p * distance,
           .count = count,
           .terms = terms,
           .scale = call_.terms.scale,
           .x_rnorm = &x_rnorm_[p * kPanel],
           .target_score = &target_score_[p * kPanel],
           .target = target,
           .logits = slot.logits},
          out.panel(p));
    }
  }

  void write() {
    for (int64_t n = 0; n < call_.N; ++n) {
      const PanelStatistics of_panel = total_.panel(n / kPanel);
      const int64_t i = n % kPanel;
      out_.saved.max[n] = of_panel.max[i];
      out_.saved.sum_exp[n] = of_panel.sum_exp[i];
      out_.rank[n] = call_.label[n] == kIgnored ? -1 : of_panel.rank[i];
      if (out_.sum) out_.sum[n] = of_panel.sum[i];
    }
  }

  const Call<float>& call_;
  const PanelCall panel_call_;
  const Statistics<float>& out_;
  const int64_t kept_classes_;
  Rows<float> weight_;
  std::vector<float> target_score_, x_rnorm_;
  Buffer columns_, memory_;
  std::vector<Slot> slots_;
  std::vector<SampleStatistics> blocks_;  // of each block in a wave
  SampleStatistics total_;
};

}  // namespace

void panel_forward(const Call<float>& call, const PanelKernels& kernels,
                   const Statistics<float>& out) {
  PanelForward(call, kernels, out).run();
}

}  // namespace tvmf::cpu
