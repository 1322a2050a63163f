// The gradients of a block's classes in class_gradient, from the gradient tiles t of all rows:
//   dw_c = q_c (sum_n t r_n x_n - (sum_n t c) q_c w_c)
// and those of bias and kappa, from the tiles' sums.
#pragma once

#include "cuda/rows/gradient_row.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/mainloop.cuh"

namespace tvmf::sm80 {

// Adds up the column sums of the block's classes: factors of the weight gradient, and the gradients
// of bias and kappa.
template <class K>
__device__ __forceinline__ void finish_columns(const typename K::Params& p, unsigned char* smem) {
  using T = typename K::T;
  const CudaHead& head = p.head;
  auto& tail = K::tail(smem);
  const bool both = K::kLatency && p.work.gradient;
  const int64_t first_slot = both ? blockIdx.y : 0, slots = both ? 1 : p.work.row_groups;
  const bool per_class_kappa = p.out.kappa.data && head.kappa.stride != 0;
  for (int i = threadIdx.x; i < K::kClasses; i += K::kThreads) {
    const int64_t column = K::first_column() + i, c = p.chunk.begin + column;
    T sums[3] = {};
    for (int which = 0; which < 3; ++which)
      for (int64_t s = first_slot; s < first_slot + slots; ++s)
        sums[which] += p.sums.columns[(s * 3 + which) * p.chunk.size + column];
    const T rnorm = c < head.C ? p.saved.weight_rnorm[c] : T(0);
    tail.factor[i] = outer_factor(p.rows.loss_scale[1], rnorm, K::kMath == Math::kF16);
    tail.projection[i] = projection(sums[0], rnorm);
    if (blockIdx.y != 0 || c >= head.C) continue;
    const T scale = Scale<T>::of(head).value;
    if (p.out.bias.data) store_at(p.out.bias, c, scale * sums[1]);
    if (per_class_kappa) store_at(p.out.kappa, c, scale * sums[2]);
  }
}

// Multiplies the gradient tiles of all rows by the features, and projects.
template <class K>
__device__ __forceinline__ void make_weight_gradient(const typename K::Params& p,
                                                     unsigned char* smem) {
  using X = typename K::X;
  using W = typename K::W;
  using T = typename K::T;
  using LayoutG = typename K::LayoutG;
  using LayoutXt = typename K::LayoutXt;
  using WeightTile = typename K::WeightTile;
  const CudaHead& head = p.head;
  const auto& tail = K::tail(smem);
  const Lane lane = Lane::of<WeightTile>();
  const auto x = Operand<X>::of(p.x, head.N, head.D);
  const auto weight = Operand<W>::of(head.weight, head.C, head.D);
  const auto gradient = Operand<X>::of(p.gradient.data, p.chunk.size, 1, head.N, p.chunk.size);
  const bool resident = K::kLatency && p.work.resident;
  const int64_t first_column = K::first_column();
  const int64_t all_tiles = (head.D + WeightTile::kCols - 1) / WeightTile::kCols;
  const int64_t per_split = (all_tiles + p.work.feature_splits - 1) / p.work.feature_splits;
  const int64_t first_tile = blockIdx.y * per_split, left = all_tiles - first_tile;
  const int tiles = int(left < per_split ? left : per_split);
  T acc[WeightTile::kFragsRow][WeightTile::kFragsCol][4];
  clear(acc);
  TileLoader<LayoutG, K::kThreads> load_g(gradient);
  TileLoader<LayoutXt, K::kThreads> load_x(x);
  const auto load_a = [&](int, int step, int stage) {
    if (!resident)
      load_g.load(int64_t(step) * K::kDepth, first_column, step == 0,
                  smem + stage * K::kWeightStage);
  };
  const auto load_b = [&](int tile, int step, int stage) {
    load_x.load(int64_t(step) * K::kDepth, (first_tile + tile) * WeightTile::kCols, step == 0,
                smem + stage * K::kWeightStage + LayoutG::kBytes);
  };
  const auto multiply = [&](int step, int stage) {
    const unsigned char* g_smem = smem + stage * K::kWeightStage;
    const unsigned char* x_smem = g_smem + LayoutG::kBytes;
    if (resident) g_smem = smem + K::kBytes + step * K::kDepth * LayoutG::kLineBytes;
    multiply_stage<K::kMath, WeightTile, LayoutG, LayoutXt>(g_smem, x_smem, lane, acc);
  };
  const auto finish = [&](int tile) {
    const int64_t first_feature = (first_tile + tile) * WeightTile::kCols;
#pragma unroll
    for (int r = 0; r < 2 * WeightTile::kFragsRow; ++r) {
      const int row = lane.row<WeightTile>(r / 2, r % 2);
      const int64_t c = p.chunk.begin + first_column + row;
      if (c >= head.C) continue;
      const T factor = tail.factor[row], projected = tail.projection[row];
#pragma unroll
      for (int j = 0; j < WeightTile::kFragsCol; ++j) {
        const int64_t d = first_feature + lane.col<WeightTile>(j);
        const W* from = weight.data + c * weight.line_stride + d * weight.element_stride;
        const bool aligned = head.D % 2 == 0;
        Pair<W> w{};
        if (weight.vectors && aligned && d < head.D) {
          w = load_as<Pair<W>>(from);
        } else {
          if (d < head.D) w.low = from[0];
          if (d + 1 < head.D) w.high = from[weight.element_stride];
        }
        const T value[2] = {
            factor * acc[r / 2][j][r % 2 * 2] - projected * to_number<T>(w.low),
            factor * acc[r / 2][j][r % 2 * 2 + 1] - projected * to_number<T>(w.high)};
        if (d < head.D) store_pair_at(p.out.weight, c * head.D + d, value[0], value[1], aligned);
        if (!aligned && d + 1 < head.D) store_at(p.out.weight, c * head.D + d + 1, value[1]);
      }
    }
    clear(acc);
  };
  const int steps = int((head.N + K::kDepth - 1) / K::kDepth);
  if (tiles > 0)
    pipeline<K::kWeightStages>(tiles, steps, load_a, load_b, Nothing{}, Nothing{}, multiply,
                               finish);
}

}  // namespace tvmf::sm80
