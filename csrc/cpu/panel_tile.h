// What is done with a panel of products <w_c, x_n>: the rows are the classes of a block, the 16
// columns are samples, and every sum over classes is one vector. The formulas are those of tile.h.
#pragma once

#include <cstdint>

#include "cpu/panels.h"
#include "cpu/tile.h"

namespace tvmf::cpu {

// The statistics of samples over a range of classes, without the target.
struct PanelStatistics {
  float* max;      // [16]  the largest logit
  float* sum_exp;  // [16]  sum of exp(logit - max)
  float* sum;      // [16]  sum of class_weight * logit; null where it is not wanted
  int32_t* rank;   // [16]  classes that do not score at or below the target
};

struct ForwardPanel {
  const float* product;  // [count, 16]
  int64_t count;
  ClassTerms<float> terms;  // [count] each
  float scale;
  const float* x_rnorm;       // [16]  0 beyond the last sample
  const float* target_score;  // [16]
  const int32_t* target;      // [16]  the row of the sample's target, or -1
  float* logits;              // [count, 16] of scratch memory
};

// dL/dothers / sum_exp, dL/dsum, and what is subtracted from the largest logit and from scores.
struct PanelGradients {
  const float *others, *sum, *max, *score;  // [16] each
};

struct BackwardPanel {
  const float* product;  // [count, 16]
  float* grad;           // [count, 16]  t_nc r_n q_c; may be the memory of `product`
  int64_t count;
  ClassTerms<float> terms;
  float scale;
  const float* x_rnorm;   // [16]
  const int32_t* target;  // [16]
  PanelGradients upstream;
  const RowGradient<float>* gradient;  // of the samples that the panel has
  float* row_dot;                      // [16]  as in BackwardTile
  float* row_scale;                    // [16]
  float* col_dot;                      // [count, 16]  the panel is added to it, sample by sample
  float* col_bias;                     // [count, 16]  so it is here; null where it is not wanted
  float* col_kappa;                    // [count, 16]
};

// out[i, k] = panels[k / 16, i, k % 16] + factor[i] * other[i, k]
struct UnpackedRows {
  int64_t count, cols;
  const float* panels;
  int64_t distance;
  const float* other;
  int64_t other_stride;
  const float* factor;  // [count]
  float* out;
  int64_t out_stride;
  bool past_caches;  // for memory that is not read again soon
};

struct PanelTileKernels {
  void (*forward)(const ForwardPanel& panel, const PanelStatistics& out);
  // into (+)= more, always in the order of classes
  void (*merge)(const PanelStatistics& more, const PanelStatistics& into);
  void (*backward)(const BackwardPanel& panel);
  // out[i] = sum of rows[i, :], rows [count, 16]
  void (*add_lanes)(const float* rows, int64_t count, float* out);
  void (*unpack)(const UnpackedRows& rows);
};

}  // namespace tvmf::cpu
