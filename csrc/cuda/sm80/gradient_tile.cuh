// The gradient tiles of a block of class_gradient, t_nc = dL/dcosine, and the sums over them that
// the gradients of the features, the weight, the biases, kappa and the scale need.
#pragma once

#include "cuda/rows/gradient_row.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/mainloop.cuh"

namespace tvmf::sm80 {

// The sums of a lane over its rows of a tile, for some of its columns.
template <class T, int kCols>
struct LaneSums {
  T dot[kCols] = {};    // sum_n t c
  T bias[kCols] = {};   // sum_n g
  T kappa[kCols] = {};  // sum_n g dphi/dkappa
};

// Adds the block's sums over warps, in order, and stores them.
template <class K>
__device__ __forceinline__ void store_sums(const typename K::Params& p, unsigned char* smem,
                                           typename K::T by_scale, typename K::T scale) {
  using T = typename K::T;
  using GradientTile = typename K::GradientTile;
  auto& tail = K::tail(smem);
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
  const double block_scale = block_sum(double(by_scale), tail.sums);
  total_kappa = block_sum(total_kappa, tail.sums) * double(scale);
  const bool both = K::kLatency && p.work.weight;
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
  const bool both = K::kLatency && p.work.weight, first = !both || blockIdx.y == 0;
  for (int i = threadIdx.x; i < K::kClasses; i += K::kThreads) {
    const int64_t c = first_class + i;
    tail.classes.set(i, ClassValues<T>::of_gradient(head, c, scale));
    tail.classes.rnorm[i] = c < head.C ? p.saved.weight_rnorm[c] : T(0);
    for (auto& of_warps : tail.column_sums)
      for (auto& sums : of_warps) sums[i] = 0;
  }

  const int64_t all_tiles = (head.N + GradientTile::kRows - 1) / GradientTile::kRows;
  const int64_t groups = both ? 1 : p.work.row_groups;
  const int64_t per_group = (all_tiles + groups - 1) / groups;
  const int64_t first_tile = both ? 0 : blockIdx.y * per_group;
  const int64_t left = all_tiles - first_tile;
  const int tiles = int(left < per_group ? left : per_group);

  T acc[GradientTile::kFragsRow][GradientTile::kFragsCol][4];
  clear(acc);
  T sum_by_scale = 0;  // sum g (z - max - prior), of the lane's elements

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
  const bool resident = K::kLatency && p.work.resident;
  const bool stored = first && (p.out.x.data || !resident);
  const auto tile_smem = [&](int row, int col) {
    return smem + K::kBytes + LayoutG::offset(row, col);
  };
  // Makes a tile of gradients of the tile of products. `all`: also what the biases and kappa need,
  // and the part of the logits' sum. A lane's columns are taken in groups, so that neither their
  // sums nor what is known of a row's elements takes many registers.
  const auto make_tile = [&](int tile, auto all) {
    constexpr bool kAll = decltype(all)::value;
    constexpr int kFrags = GradientTile::kFragsCol < 4 ? GradientTile::kFragsCol : 4;
    constexpr int kCols = 2 * kFrags, kRows = 2 * GradientTile::kFragsRow;  // of a lane
    const int first_row = int(first_tile + tile) * GradientTile::kRows;
    T row_dots[kRows] = {};
#pragma unroll
    for (int j0 = 0; j0 < GradientTile::kFragsCol; j0 += kFrags) {
      const int first_col = lane.col<GradientTile>(j0);
      LaneSums<T, kCols> sums;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = r / 2, half = r % 2 * 2;
        const int n = computed_here(first_row + lane.row<GradientTile>(i, r % 2));
        // The branch keeps a row's numbers apart from the next one's. nvcc would otherwise put off
        // the sums of a row, and its numbers would take registers beside those of the next.
        if (n < head.N) {
          const auto row = load_as<GradientRow<T>>(p.rows.rows + n);
          T cosine[kCols], g[kCols], t[kCols], by_scale[kCols];
          [[maybe_unused]] T phi_by_kappa[kCols];
#pragma unroll
          for (int j = 0; j < kFrags; ++j) {
            const int col = first_col + 8 * j;
            const auto rnorm = tail.classes.pair(tail.classes.rnorm, col);
            const auto kappa = tail.classes.pair(tail.classes.kappa, col);
            const auto offset = tail.classes.pair(tail.classes.offset, col);
            const auto prior = tail.classes.pair(tail.classes.bias, col);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int at = 2 * j + e;
              cosine[at] = cosine_of(acc[i][j0 + j][half + e], row.rnorm,
                                     operand_rnorm<K::kMath, W>(e ? rnorm.high : rnorm.low));
              const auto s = similarity_with_gradient(cosine[at], e ? kappa.high : kappa.low);
              const T logit = logit_of(scale, s.phi, e ? offset.high : offset.low);
              const T below = logit - row.max;
              g[at] = row.others * exp_of(below);
              if (kAll && p.with_sum) g[at] += row.sum * tail.classes.omega[col + e];
              t[at] = g[at] * scale * s.dphi_dcosine;
              by_scale[at] = below - (e ? prior.high : prior.low);
              if constexpr (kAll) phi_by_kappa[at] = s.dphi_dkappa;
            }
          }
          // Few rows have their target among the block's classes.
          const int target = column_of(row.label, first_class, K::kClasses);
          if (target >= 0) {
            const auto given = load_as<TargetGradient<T>>(p.rows.targets + n);
#pragma unroll
            for (int at = 0; at < kCols; ++at) {
              if (target - first_col != at / 2 * 8 + at % 2) continue;
              cosine[at] = given.cosine, t[at] = given.by_cosine;
              g[at] = given.by_logit, by_scale[at] = 0;
              if constexpr (kAll) phi_by_kappa[at] = given.phi_by_kappa;
            }
          }
          X* to = gradient + int64_t(n) * p.chunk.size + first_column + first_col;
#pragma unroll
          for (int j = 0; j < kFrags; ++j) {
            const auto rnorm = tail.classes.pair(tail.classes.rnorm, first_col + 8 * j);
            T scaled[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int at = 2 * j + e;
              row_dots[r] = fma(t[at], cosine[at], row_dots[r]);
              sums.dot[at] = fma(t[at], cosine[at], sums.dot[at]);
              if constexpr (kAll) {
                sums.bias[at] += g[at];
                sums.kappa[at] = fma(g[at], phi_by_kappa[at], sums.kappa[at]);
              }
              sum_by_scale = fma(g[at], by_scale[at], sum_by_scale);
              scaled[e] =
                  t[at] * row.scaled_rnorm * inner_rnorm<K::kMath>(e ? rnorm.high : rnorm.low);
            }
            const Pair<X> pair = round_pair<X>(scaled[0], scaled[1]);
            if (resident) store_as(tile_smem(n, first_col + 8 * j), pair);
            if (stored) store_as(to + 8 * j, pair);
          }
        } else if (resident) {
#pragma unroll
          for (int j = 0; j < kFrags; ++j) store_as(tile_smem(n, first_col + 8 * j), Pair<X>{});
        }
        if (j0 + kFrags < GradientTile::kFragsCol) continue;
        const T row_dot = quad_sum(row_dots[r]);
        if (first && n < head.N && lane.quad == 0) {
          const int64_t slot = blockIdx.x * GradientTile::kWarpsCol + lane.warp_col;
          T& sum = p.sums.row_dot[slot * head.N + n];
          sum = p.chunk.begin == 0 ? row_dot : sum + row_dot;
        }
      }
      // The warp's sums, each added by the lane of its column.
      const auto add = [&](int which, T(&of_lane)[kCols]) {
        const T sum = group_sums(of_lane, lane.group);
        const int at = lane.group % kCols;
        if (lane.group < kCols)
          tail.column_sums[lane.warp_row][which][first_col + at / 2 * 8 + at % 2] += sum;
      };
      add(0, sums.dot);
      if constexpr (kAll) {
        add(1, sums.bias);
        add(2, sums.kappa);
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
  store_sums<K>(p, smem, sum_by_scale, scale);
  __syncthreads();
}

}  // namespace tvmf::sm80
