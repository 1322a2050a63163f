// The work on panels beside their products. CMake compiles this file once for each instruction set
// and names it in TVMF_ISA. All sets give the same bits, because a sum over classes is in order for
// each sample, a sum over samples is kept in 16 lanes, and no multiply-add is contracted.
#include "cpu/panel_tile.h"

#include <algorithm>
#include <limits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "cpu/simd.h"
#include "similarity.h"

namespace tvmf::cpu::TVMF_ISA {
namespace {

using S = Simd<float>;
using Vec = S::Vec;
using Int = S::Int;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline Int load_int(const int32_t* p) {
  return std::bit_cast<Int>(S::load(reinterpret_cast<const float*>(p)));
}
inline void store_int(int32_t* p, Int v) {
  S::store(reinterpret_cast<float*>(p), std::bit_cast<Vec>(v));
}

// `kWithTarget` says whether a sample of the panel has its target among the classes.
template <bool kWithSum, bool kWithTarget>
void forward_panel(const ForwardPanel& panel, const PanelStatistics& out) {
  const ClassTerms<float> terms = panel.terms;
  for (int64_t lane = 0; lane < kPanel; lane += S::kWidth) {
    const Vec x_rnorm = S::load(panel.x_rnorm + lane);
    const Vec target_score = S::load(panel.target_score + lane);
    const Int target = load_int(panel.target + lane);
    Vec largest = Vec{} - kInfinity, sum{};
    Int at_or_below{};
    for (int64_t c = 0; c < panel.count; ++c) {
      const Vec rnorm = x_rnorm * terms.weight_rnorm[c];
      const Vec cosine = clamp_cosine(S::load(panel.product + c * kPanel + lane) * rnorm);
      const Vec phi = similarity(cosine, Vec{} + terms.kappa[c]);
      const Vec logit_of_class = phi * panel.scale + terms.offset[c];
      Vec logit = logit_of_class;
      Int counted = (phi + terms.bias[c]) <= target_score;
      if constexpr (kWithTarget) {
        const Int is_target = target == int32_t(c);
        logit = is_target ? Vec{} - kInfinity : logit;
        counted |= is_target;
        if constexpr (kWithSum) sum += is_target ? Vec{} : logit_of_class * terms.class_weight[c];
      } else if constexpr (kWithSum) {
        sum += logit_of_class * terms.class_weight[c];
      }
      S::store(panel.logits + c * kPanel + lane, logit);
      largest = logit > largest ? logit : largest;
      at_or_below += counted;  // a true comparison is -1
    }

    // If all logits are -inf, the sum is 0.
    const Vec shift = largest == -kInfinity ? Vec{} : largest;
    Vec sum_exp{};
    for (int64_t c = 0; c < panel.count; ++c)
      sum_exp += S::exp(S::load(panel.logits + c * kPanel + lane) - shift);

    S::store(out.max + lane, largest);
    S::store(out.sum_exp + lane, sum_exp);
    store_int(out.rank + lane, at_or_below + int32_t(panel.count));
    if constexpr (kWithSum) S::store(out.sum + lane, sum);
  }
}

// Whether all 16 numbers are `value`.
inline bool all_are(const int32_t* numbers, int32_t value) {
  return std::all_of(numbers, numbers + kPanel, [=](int32_t n) { return n == value; });
}

void forward(const ForwardPanel& panel, const PanelStatistics& out) {
  if (all_are(panel.target, -1))
    out.sum ? forward_panel<true, false>(panel, out) : forward_panel<false, false>(panel, out);
  else
    out.sum ? forward_panel<true, true>(panel, out) : forward_panel<false, true>(panel, out);
}

void merge(const PanelStatistics& more, const PanelStatistics& into) {
  for (int64_t lane = 0; lane < kPanel; lane += S::kWidth) {
    const Vec old = S::load(into.max + lane), added = S::load(more.max + lane);
    const Vec largest = added > old ? added : old;
    // Also where both are -inf, whose difference is no number.
    const Vec keep_old = old == largest ? Vec{} + 1 : S::exp(old - largest);
    const Vec keep_added = added == largest ? Vec{} + 1 : S::exp(added - largest);
    S::store(into.max + lane, largest);
    S::store(into.sum_exp + lane,
             S::load(into.sum_exp + lane) * keep_old + S::load(more.sum_exp + lane) * keep_added);
    store_int(into.rank + lane, load_int(into.rank + lane) + load_int(more.rank + lane));
    if (into.sum) S::store(into.sum + lane, S::load(into.sum + lane) + S::load(more.sum + lane));
  }
}

// Without the targets, whose g counts as 0. `kPlain` says that every sample has a gradient and no
// target among the classes.
template <bool kWithSum, bool kClassSums, bool kPlain>
void backward_others(const BackwardPanel& panel) {
  const ClassTerms<float> terms = panel.terms;
  const float scale = panel.scale;
  for (int64_t lane = 0; lane < kPanel; lane += S::kWidth) {
    const Vec x_rnorm = S::load(panel.x_rnorm + lane), max = S::load(panel.upstream.max + lane);
    const Vec others = S::load(panel.upstream.others + lane);
    const Vec s = kWithSum ? S::load(panel.upstream.sum + lane) : Vec{};
    const Vec score = S::load(panel.upstream.score + lane);
    const Int target = load_int(panel.target + lane), live = (others != 0) | (s != 0);
    Vec row_dot{}, row_scale{};
    for (int64_t c = 0; c < panel.count; ++c) {
      const int64_t at = c * kPanel + lane;
      // The logit is computed from the product again, to the bits of the forward pass. The features
      // of a sample without a gradient may be anything.
      Vec product = S::load(panel.product + at);
      if constexpr (!kPlain) product = live ? product : Vec{};
      const Vec rnorm = x_rnorm * terms.weight_rnorm[c];
      const Vec cosine = clamp_cosine(product * rnorm);
      const auto sim = similarity_with_gradient(cosine, Vec{} + terms.kappa[c]);
      const Vec logit = sim.phi * scale + terms.offset[c];

      // g = dL/dlogit, t = dL/dcosine
      Vec g = S::exp(logit - max) * others;
      if constexpr (kWithSum) g += s * terms.class_weight[c];
      if constexpr (!kPlain) g = (live & (target != int32_t(c))) ? g : Vec{};
      const Vec t = g * (scale * sim.dphi_dcosine);

      S::store(panel.grad + at, t * rnorm);
      row_dot += t * cosine;
      row_scale += g * (sim.phi + terms.bias[c] - score);
      S::store(panel.col_dot + at, S::load(panel.col_dot + at) + t * cosine);
      if constexpr (kClassSums) {
        S::store(panel.col_bias + at, S::load(panel.col_bias + at) + g);
        S::store(panel.col_kappa + at, S::load(panel.col_kappa + at) + g * sim.dphi_dkappa);
      }
    }
    S::store(panel.row_dot + lane, row_dot);
    S::store(panel.row_scale + lane, row_scale);
  }
}

template <bool kWithSum, bool kClassSums>
void backward_panel(const BackwardPanel& panel) {
  const auto live = [&](int64_t i) {
    return panel.upstream.others[i] != 0 || (kWithSum && panel.upstream.sum[i] != 0);
  };
  bool plain = all_are(panel.target, -1);
  for (int64_t i = 0; i < kPanel; ++i) plain = plain && live(i);
  if (plain) return backward_others<kWithSum, kClassSums, true>(panel);

  backward_others<kWithSum, kClassSums, false>(panel);
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t c = panel.target[i];
    if (c < 0) continue;
    const RowGradient<float>& row = panel.gradient[i];
    const float dot = row.by_cosine * row.cosine;
    panel.grad[c * kPanel + i] = row.by_cosine * (panel.terms.weight_rnorm[c] * panel.x_rnorm[i]);
    panel.row_dot[i] += dot;
    panel.col_dot[c * kPanel + i] += dot;
    if constexpr (kClassSums) {
      panel.col_bias[c * kPanel + i] += row.by_logit;
      panel.col_kappa[c * kPanel + i] += row.by_phi_kappa;
    }
  }
}

void backward(const BackwardPanel& panel) {
  if (panel.upstream.sum)
    panel.col_bias ? backward_panel<true, true>(panel) : backward_panel<true, false>(panel);
  else
    panel.col_bias ? backward_panel<false, true>(panel) : backward_panel<false, false>(panel);
}

void add_lanes(const float* rows, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i, rows += kPanel) {
    float sums[kPanel / 2];
    for (int64_t j = 0; j < 8; ++j) sums[j] = rows[j] + rows[j + 8];
    for (int64_t j = 0; j < 4; ++j) sums[j] += sums[j + 4];
    out[i] = (sums[0] + sums[2]) + (sums[1] + sums[3]);
  }
}

// Writes past the caches, which then need not fetch the memory first.
inline void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__) && !defined(TVMF_EMULATED)
  _mm256_stream_ps(p, v);
#else
  S::store(p, v);
#endif
}

// Other threads see what was streamed only after this.
inline void end_of_stream() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

void unpack(const UnpackedRows& rows) {
  bool streamed = false;
  for (int64_t i = 0; i < rows.count; ++i) {
    const float *panel = rows.panels + i * kPanel, *other = rows.other + i * rows.other_stride;
    const float factor = rows.factor[i];
    float* out = rows.out + i * rows.out_stride;
    const bool aligned = reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
    const bool past_caches = rows.past_caches && aligned;
    int64_t k = 0;
    for (; k + kPanel <= rows.cols; k += kPanel, panel += rows.distance)
      for (int64_t j = 0; j < kPanel; j += S::kWidth) {
        const Vec value = S::load(panel + j) + S::load(other + k + j) * factor;
        past_caches ? stream(out + k + j, value) : S::store(out + k + j, value);
      }
    for (int64_t j = 0; k + j < rows.cols; ++j) out[k + j] = panel[j] + other[k + j] * factor;
    streamed |= past_caches;
  }
  if (streamed) end_of_stream();
}

}  // namespace

extern const PanelTileKernels kPanelTile;
const PanelTileKernels kPanelTile{.forward = forward,
                                  .merge = merge,
                                  .backward = backward,
                                  .add_lanes = add_lanes,
                                  .unpack = unpack};

}  // namespace tvmf::cpu::TVMF_ISA
