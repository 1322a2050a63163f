// The elementwise work on a tile of gradients, t_nc = dL/dcosine, in the kernel that makes its
// products again and in the one whose products were kept. A lane has two classes, and for each of
// them 8 successive rows at a time. An element takes few multiplications because its class and its
// row take the rest: d has the unit 1 / sqrt((1 + 2 kappa) q), so that its inverse's square holds
// the slope of phi and the class's norm, and g stands for g times the scale.
#pragma once

#include "cuda/rows/gradient_row.cuh"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/logits.cuh"

namespace tvmf::sm90 {

// One is left out after each 8 rows, so that lanes of different quads read different banks.
__host__ __device__ constexpr int target_at(int row) { return row + row / 8; }

// The terms of rows in shared memory, in the order in which they are read.
struct RowTerms {
  float *half_rnorm, *scaled_rnorm, *start;
  float* others;  // scale dL/dothers / sum_exp
  float* sum;     // scale dL/dsum
  int* label;
  TargetGradient<float>* target;  // at target_at(row)

  // Row i. A row beyond the last gets so high a maximum that its exponentials are finite: its
  // gradient is an exponential times 0, which must not be NaN.
  __device__ __forceinline__ void set(int i, bool inside, const GradientRow<float>& row,
                                      float scale) const {
    half_rnorm[i] = inside ? half_rnorm_of(row.rnorm) : 0.0f;
    scaled_rnorm[i] = row.scaled_rnorm;
    start[i] = start_of(scale, inside ? row.max : -kLowest<float>, half_rnorm[i]);
    others[i] = scale * row.others;
    sum[i] = scale * row.sum;
    label[i] = inside ? int(row.label) : int(kIgnored);
  }
};

// The terms of a lane's two classes, 8 apart.
struct PairOfClasses {
  ClassForm form[2];
  float offset[2], bias[2], omega[2];
  float inner[2];  // the class's norm, as the gradient tile has it
  bool inside[2];

  // `norms_of` gives the inverse norms of a class: in its products, and in the gradient tile.
  template <class F>
  static __device__ __forceinline__ PairOfClasses of(const CudaHead& head, int64_t first,
                                                     float scale, const F& norms_of) {
    PairOfClasses pair;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t c = first + h * 8;
      pair.inside[h] = c < head.C;
      const auto terms = ClassValues<float>::of_gradient(head, c, scale);
      const float kappa = bounded_kappa(terms.kappa);
      const Pair<float> rnorm = norms_of(h, c);
      pair.inner[h] = rnorm.high;
      pair.form[h] = ClassForm::of(kappa, rnorm.low, fast_rsqrt((1 + 2 * kappa) * pair.inner[h]),
                                   scale, pair.inside[h]);
      pair.offset[h] = kLog2E * terms.offset, pair.bias[h] = pair.offset[h] - kLog2E * terms.bias;
      pair.omega[h] = terms.omega;
    }
    return pair;
  }
};

// What a lane sums over the rows of a tile for its two classes, and over all of its tiles.
struct PairSums {
  float dot[2] = {}, g[2] = {}, kappa[2] = {};
};
struct TotalSums {
  float scale = 0, kappa = 0;
};

// The gradients of the lane's 8 rows from `row` on, as pairs of 16-bit numbers. `product(i, h)` is
// the product of row i and class h. The lane's first class is `first_class`; kTarget: whether one
// of the warp's rows may have its target among the warp's classes.
template <Math kMath, Terms kTerms, bool kTarget, class Product>
__device__ __forceinline__ void gradient_rows(const RowTerms& rows, int row, int first_class,
                                              const PairOfClasses& classes, const Product& product,
                                              PairSums& sums, TotalSums& totals,
                                              uint32_t (&pairs)[2][4]) {
  constexpr bool kAll = kTerms == Terms::kAll, kOffset = kTerms != Terms::kPlain;
  constexpr int kLoad = 4;
  float half_rnorm[kLoad], scaled_rnorm[kLoad], start[kLoad], others[kLoad];
  [[maybe_unused]] float sum[kLoad];
  float value[2];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int k = i % kLoad;
    if (k == 0) {
      load_rows(half_rnorm, rows.half_rnorm, row + i);
      load_rows(scaled_rnorm, rows.scaled_rnorm, row + i);
      load_rows(start, rows.start, row + i);
      load_rows(others, rows.others, row + i);
      if constexpr (kAll) load_rows(sum, rows.sum, row + i);
    }
    const auto pair = PairForm::of<true>(classes.form, half_rnorm[k], product(i, 0), product(i, 1));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float quotient = pair.v[h] * pair.inv_d[h];
      const float above = fma(quotient, classes.form[h].slope, start[k]);
      float g = others[k] * fast_exp2(kOffset ? above + classes.offset[h] : above);
      if constexpr (kAll) g = fma(sum[k], classes.omega[h], g);
      float t = g * (pair.inv_d[h] * pair.inv_d[h]);  // times the class's norm
      bool is_target = false;
      if constexpr (kTarget) is_target = rows.label[row + i] == first_class + h * 8;
      if (!is_target) {
        totals.scale = fma(g, above, totals.scale);
        if constexpr (kAll) {
          sums.g[h] += g;
          sums.kappa[h] =
              fma(g * pair.inv_d[h], fma(pair.v[h], quotient, -quotient), sums.kappa[h]);
        }
      } else {
        const auto target = load_as<TargetGradient<float>>(rows.target + target_at(row) + i);
        t = target.by_cosine * classes.inner[h];
      }
      sums.dot[h] = fma(t, pair.scaled[h], sums.dot[h]);
      const float scaled = t * scaled_rnorm[k];
      if (i % 2 == 0)
        value[h] = scaled;
      else
        pairs[h][i / 2] = pack<kMath>(value[h], scaled);
    }
  }
}

// The same where `has_target` says whether the warp's rows have a target among its classes.
template <Math kMath, Terms kTerms, class Product>
__device__ __forceinline__ void gradient_rows(const RowTerms& rows, int row, int first_class,
                                              bool has_target, const PairOfClasses& classes,
                                              const Product& product, PairSums& sums,
                                              TotalSums& totals, uint32_t (&pairs)[2][4]) {
  if (has_target) {
    gradient_rows<kMath, kTerms, true>(rows, row, first_class, classes, product, sums, totals,
                                       pairs);
    __syncwarp();  // lanes have read the terms of their targets one after another
  } else {
    gradient_rows<kMath, kTerms, false>(rows, row, first_class, classes, product, sums, totals,
                                        pairs);
  }
}

// The sums of the lane's classes over its rows: of t c, and of g and g dphi/dkappa times the scale.
// Those of targets are still missing. `dot_factor` is what t c lacks beside the 2 of half_rnorm.
template <Terms kTerms>
__device__ __forceinline__ void finish_sums(const PairOfClasses& classes, const PairSums& sums,
                                            const float (&dot_factor)[2], TotalSums& totals,
                                            float (&finished)[3][2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    finished[0][h] = 2 * sums.dot[h] * dot_factor[h];
    if constexpr (kTerms == Terms::kAll) {
      totals.scale = fma(sums.g[h], classes.bias[h], totals.scale);
      finished[1][h] = sums.g[h];
      finished[2][h] = sums.kappa[h] * (4 * classes.form[h].unit * classes.form[h].unit);
    }
  }
}

// Adds the targets among the lane's 8 rows from `row` on to the sums of g and g dphi/dkappa.
__device__ __forceinline__ void add_targets(const RowTerms& rows, int row, int first_class,
                                            float scale, float (&finished)[3][2]) {
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const int h8 = rows.label[row + i] - first_class;
    if (h8 != 0 && h8 != 8) continue;
    const auto target = load_as<TargetGradient<float>>(rows.target + target_at(row) + i);
    const float g = scale * target.by_logit;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (h8 == h * 8) finished[1][h] += g, finished[2][h] += g * target.phi_by_kappa;
  }
}

// Stores 8 rows of a class.
__device__ __forceinline__ void store_gradients(uint16_t* to, const uint32_t (&pairs)[4]) {
  struct alignas(16) Four {
    uint32_t v[4];
  };
  store_as(to, Four{pairs[0], pairs[1], pairs[2], pairs[3]});
}

}  // namespace tvmf::sm90
