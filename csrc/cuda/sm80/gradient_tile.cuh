// The gradient tiles of a block of class_gradient, t_nc = dL/dcosine, and the sums over them that
// the gradients of the features, the weight, the biases, kappa and the scale need.
#pragma once

#include "cuda/rows/gradient_row.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/mainloop.cuh"

namespace tvmf::sm80 {

// The sums of a lane over the rows of its gradient tiles.
template <class T, class GradientTile>
struct LaneSums {
  T dot[GradientTile::kFragsCol][2] = {};    // sum_n t c
  T bias[GradientTile::kFragsCol][2] = {};   // sum_n g
  T kappa[GradientTile::kFragsCol][2] = {};  // sum_n g dphi/dkappa
  T scale = 0;                               // sum g (z - max - prior), over its classes too
};

// Adds the sums of lanes and then of warps, in order, and stores those of the block.
template <class K>
__device__ __forceinline__ void store_sums(
    const typename K::Params& p, unsigned char* smem, const Lane& lane,
    const LaneSums<typename K::T, typename K::GradientTile>& lanes, typename K::T scale) {
  using T = typename K::T;
  using GradientTile = typename K::GradientTile;
  auto& tail = K::tail(smem);
#pragma unroll
  for (int j = 0; j < GradientTile::kFragsCol; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const T dot = group_sum(lanes.dot[j][e]), bias = group_sum(lanes.bias[j][e]),
              kappa = group_sum(lanes.kappa[j][e]);
      if (lane.group != 0) continue;
      const int col = lane.col<GradientTile>(j) + e;
      tail.column_sums[lane.warp_row][0][col] = dot;
      tail.column_sums[lane.warp_row][1][col] = bias;
      tail.column_sums[lane.warp_row][2][col] = kappa;
    }
  __syncthreads();
  double total_kappa = 0;
  for (int i = threadIdx.x; i < 3 * K::kClasses; i += K::kThreads) {
    const int which = i / K::kClasses, col = i % K::kClasses;
    T sum = 0;
    for (int w = 0; w < GradientTile::kWarpsRow; ++w) sum += tail.column_sums[w][which][col];
    p.sums.columns[(int64_t(blockIdx.y) * 3 + which) * p.chunk.size + K::first_column() + col] =
        sum;
    if (which == 2) total_kappa += sum;
  }
  const double block_scale = block_sum(double(lanes.scale), tail.sums);
  total_kappa = block_sum(total_kappa, tail.sums) * double(scale);
  const bool both = p.work.gradient && p.work.weight;
  if ((!both || blockIdx.y == 0) && threadIdx.x == 0) {
    const int64_t slot = both ? blockIdx.x : blockIdx.x * p.work.row_groups + blockIdx.y;
    double* totals = p.sums.totals + 2 * slot;
    totals[0] = p.chunk.begin == 0 ? block_scale : totals[0] + block_scale;
    totals[1] = p.chunk.begin == 0 ? total_kappa : totals[1] + total_kappa;
  }
}

// Makes the gradient tiles of the block's rows and classes, and the sums over them.
template <class K>
__device__ __forceinline__ void make_gradient_tiles(const typename K::Params& p,
                                                    unsigned char* smem) {
  using X = typename K::X;
  using W = typename K::W;
  using T = typename K::T;
  using LayoutX = typename K::LayoutX;
  using LayoutW = typename K::LayoutW;
  using LayoutG = typename K::LayoutG;
  using GradientTile = typename K::GradientTile;
  const CudaHead& head = p.head;
  const Lane lane = Lane::of<GradientTile>();
  const T scale = Scale<T>::of(head).value;
  auto& tail = K::tail(smem);
  X* gradient = static_cast<X*>(p.gradient.data);
  const int64_t first_column = K::first_column();
  const int64_t first_class = p.chunk.begin + first_column;
  // Blocks that share a tile's weight gradient each make the tile; the first of them stores it.
  const bool both = p.work.gradient && p.work.weight, first = !both || blockIdx.y == 0;
  for (int i = threadIdx.x; i < K::kClasses; i += K::kThreads) {
    const int64_t c = first_class + i;
    tail.classes.set(i, ClassValues<T>::of_gradient(head, c, scale));
    tail.classes.rnorm[i] = c < head.C ? p.saved.weight_rnorm[c] : T(0);
  }

  const int64_t all_tiles = (head.N + GradientTile::kRows - 1) / GradientTile::kRows;
  const int64_t groups = both ? 1 : p.work.row_groups;
  const int64_t per_group = (all_tiles + groups - 1) / groups;
  const int64_t first_tile = both ? 0 : blockIdx.y * per_group;
  const int64_t left = all_tiles - first_tile;
  const int tiles = int(left < per_group ? left : per_group);

  T acc[GradientTile::kFragsRow][GradientTile::kFragsCol][4];
  clear(acc);
  LaneSums<T, GradientTile> sums;

  // Reads the products of a tile that the forward pass kept.
  const auto read_products = [&](int tile) {
    const int64_t first_row = (first_tile + tile) * GradientTile::kRows;
#pragma unroll
    for (int r = 0; r < 2 * GradientTile::kFragsRow; ++r) {
      const int64_t n = first_row + lane.row<GradientTile>(r / 2, r % 2);
      if (n >= head.N) continue;
      const T* from = p.saved.product + n * p.saved.kept + first_class;
#pragma unroll
      for (int j = 0; j < GradientTile::kFragsCol; ++j) {
        const int col = lane.col<GradientTile>(j);
        if (first_class + col >= p.saved.kept) continue;
        const Pair<T> pair = load_as<Pair<T>>(from + col);
        acc[r / 2][j][r % 2 * 2] = pair.low;
        acc[r / 2][j][r % 2 * 2 + 1] = pair.high;
      }
    }
  };
  const bool stored = first && (p.out.x.data || !p.work.resident);
  // Makes a tile of gradients of the tile of products. `all`: also what the biases and kappa need,
  // and the part of the logits' sum.
  const auto make_tile = [&](int tile, auto all) {
    constexpr bool kAll = decltype(all)::value;
    constexpr int kCols = 2 * GradientTile::kFragsCol;  // of a lane
    const int64_t first_row = (first_tile + tile) * GradientTile::kRows;
#pragma unroll
    for (int r = 0; r < 2 * GradientTile::kFragsRow; ++r) {
      const int i = r / 2, half = r % 2 * 2;
      const int64_t n = first_row + lane.row<GradientTile>(i, r % 2);
      const bool inside = n < head.N;
      // A row beyond the last has no gradient: every exponential is 0. So is that of a class beyond
      // the last, whose offset is low.
      GradientRow<T> row{};
      row.max = T(1e30);
      if (inside) row = load_as<GradientRow<T>>(p.rows.rows + n);
      T cosine[kCols], g[kCols], t[kCols], by_scale[kCols];
      [[maybe_unused]] T phi_by_kappa[kCols];
#pragma unroll
      for (int j = 0; j < GradientTile::kFragsCol; ++j) {
        const int col = lane.col<GradientTile>(j);
        const auto rnorm = tail.classes.pair(tail.classes.rnorm, col);
        const auto kappa = tail.classes.pair(tail.classes.kappa, col);
        const auto offset = tail.classes.pair(tail.classes.offset, col);
        const auto prior = tail.classes.pair(tail.classes.bias, col);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = 2 * j + e;
          cosine[at] = cosine_of(acc[i][j][half + e], row.rnorm,
                                 operand_rnorm<K::kMath, W>(e ? rnorm.high : rnorm.low));
          const auto s = similarity_with_gradient(cosine[at], e ? kappa.high : kappa.low);
          const T logit = logit_of(scale, s.phi, e ? offset.high : offset.low);
          const T below = logit - row.max;
          g[at] = row.others * exp_of(below);
          if (kAll && p.with_sum) g[at] += row.sum * tail.classes.omega[col + e];
          t[at] = g[at] * scale * s.dphi_dcosine;
          by_scale[at] = g[at] * (below - (e ? prior.high : prior.low));
          if constexpr (kAll) phi_by_kappa[at] = s.dphi_dkappa;
        }
      }
      // Few rows have their target among the block's classes.
      const int target = column_of(inside ? row.label : kIgnored, first_class, K::kClasses);
      if (target >= 0) {
        const auto given = load_as<TargetGradient<T>>(p.rows.targets + n);
#pragma unroll
        for (int at = 0; at < kCols; ++at) {
          if (target != lane.col<GradientTile>(at / 2) + at % 2) continue;
          cosine[at] = given.cosine, t[at] = given.by_cosine;
          g[at] = given.by_logit, by_scale[at] = 0;
          if constexpr (kAll) phi_by_kappa[at] = given.phi_by_kappa;
        }
      }
      T row_dot = 0;
      Pair<X> pairs[GradientTile::kFragsCol];
#pragma unroll
      for (int j = 0; j < GradientTile::kFragsCol; ++j) {
        const auto rnorm = tail.classes.pair(tail.classes.rnorm, lane.col<GradientTile>(j));
        T scaled[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = 2 * j + e;
          const T dot = t[at] * cosine[at];
          row_dot += dot;
          sums.dot[j][e] += dot;
          if constexpr (kAll) {
            sums.bias[j][e] += g[at];
            sums.kappa[j][e] += g[at] * phi_by_kappa[at];
          }
          sums.scale += by_scale[at];
          scaled[e] = t[at] * row.scaled_rnorm * inner_rnorm<K::kMath>(e ? rnorm.high : rnorm.low);
        }
        pairs[j] = round_pair<X>(scaled[0], scaled[1]);
      }
      if (p.work.resident)
#pragma unroll
        for (int j = 0; j < GradientTile::kFragsCol; ++j)
          store_as(smem + K::kBytes + LayoutG::offset(int(n), lane.col<GradientTile>(j)), pairs[j]);
      if (stored && inside) {
        X* to = gradient + n * p.chunk.size + first_column;
#pragma unroll
        for (int j = 0; j < GradientTile::kFragsCol; ++j)
          store_as(to + lane.col<GradientTile>(j), pairs[j]);
      }
      row_dot = quad_sum(row_dot);
      if (first && inside && lane.quad == 0) {
        const int64_t slot = blockIdx.x * GradientTile::kWarpsCol + lane.warp_col;
        T& sum = p.sums.row_dot[slot * head.N + n];
        sum = p.chunk.begin == 0 ? row_dot : sum + row_dot;
      }
    }
  };
  const bool kept = p.saved.kept > 0;
  const bool all = p.with_sum || p.out.bias.data || p.out.kappa.data;
  const auto finish = [&](int tile) {
    if (kept) read_products(tile);
    if (all)
      make_tile(tile, std::true_type{});
    else
      make_tile(tile, std::false_type{});
    clear(acc);
  };

  const auto x = Operand<X>::of(head.x, head.N, head.D);
  const auto weight = Operand<W>::of(head.weight, head.C, head.D);
  TileLoader<LayoutX, K::kThreads> load_x(x);
  TileLoader<LayoutW, K::kThreads> load_w(weight);
  const auto load_a = [&](int tile, int step, int stage) {
    load_x.load((first_tile + tile) * GradientTile::kRows, int64_t(step) * K::kDepth, step == 0,
                smem + stage * K::kCosineStage);
  };
  const auto load_b = [&](int, int step, int stage) {
    load_w.load(first_class, int64_t(step) * K::kDepth, step == 0,
                smem + stage * K::kCosineStage + LayoutX::kBytes);
  };
  // Products that the forward pass kept need no steps.
  const int steps = kept ? 0 : int((head.D + K::kDepth - 1) / K::kDepth);
  if constexpr (kRounded<K::kMath, W>) {
    using RoundedW = typename K::RoundedW;
    using OwnClasses = HalfLines<LayoutW, K::kThreads>;
    const auto round = [&](int, int, int stage) {
      unsigned char* w_smem = smem + stage * K::kCosineStage + LayoutX::kBytes;
      round_lines<LayoutW, RoundedW, K::kThreads>(
          w_smem, w_smem + LayoutW::kBytes, [&](int own, FourFloats four) {
            if constexpr (kUnitWeights<K::kMath, W>) {
              const int col = OwnClasses::first() + own * OwnClasses::kStep;
              const float unit = unit_scale(tail.classes.rnorm[col]);
              for (float& value : four.value) value *= unit;
            }
            return round_four<K::kMath>(four);
          });
    };
    const auto multiply = [&](int, int stage) {
      const unsigned char* x_smem = smem + stage * K::kCosineStage;
      multiply_stage<K::kMath, GradientTile, LayoutX, RoundedW>(
          x_smem, x_smem + LayoutX::kBytes + LayoutW::kBytes, lane, acc);
    };
    pipeline<K::kCosineStages>(tiles, steps, load_a, load_b, Nothing{}, round, multiply, finish);
  } else {
    const auto multiply = [&](int, int stage) {
      const unsigned char* x_smem = smem + stage * K::kCosineStage;
      multiply_stage<K::kMath, GradientTile, LayoutX, LayoutW>(x_smem, x_smem + LayoutX::kBytes,
                                                               lane, acc);
    };
    pipeline<K::kCosineStages>(tiles, steps, load_a, load_b, Nothing{}, Nothing{}, multiply,
                               finish);
  }
  store_sums<K>(p, smem, lane, sums, scale);
  __syncthreads();
}

}  // namespace tvmf::sm80
