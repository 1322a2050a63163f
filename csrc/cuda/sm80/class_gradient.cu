// The gradient tiles of a chunk of classes, and the weight gradient that each block makes of them:
//   t_nc = dL/dcosine     dw_c = q_c (sum_n t r_n x_n - (sum_n t c) q_c w_c)
#include "cuda/rows/gradient_row.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/mainloop.cuh"

namespace tvmf::sm80 {
namespace {

// Types of one kernel and the layout of its shared memory.
template <Math kMath_, class W_>
struct ClassGradient {
  static constexpr Math kMath = kMath_;
  using W = W_;
  using X = typename MathTraits<kMath>::X;
  using T = typename MathTraits<kMath>::Acc;
  using Params = ClassGradientParams<T>;
  using GradientTile = sm80::GradientTile<kMath>;
  using WeightTile = sm80::WeightTile<kMath>;
  static_assert(GradientTile::kThreads == WeightTile::kThreads, "one block makes both");
  static constexpr int kClasses = GradientTile::kCols, kThreads = GradientTile::kThreads;
  static constexpr int kDepth = kTileD<kMath>;

  // Cosines: rows x classes.
  using LayoutX = OperandTile<X, GradientTile::kRows, kMath, false>;
  using LayoutW = OperandTile<W, GradientTile::kCols, kMath, false>;
  // Weight gradient: classes x features, summed over rows.
  using LayoutG = OperandTile<X, WeightTile::kRows, kMath, true>;
  using LayoutXt = OperandTile<X, WeightTile::kCols, kMath, true>;
  using RoundedW = OperandTile<X, GradientTile::kCols, kMath, false>;
  static constexpr int kWeightStages = kTensorCores<kMath> ? 3 : kStages<kMath, X>;
  static constexpr int kCosineStages = kRounded<kMath, W> ? kStages<kMath, W> : kWeightStages;
  static constexpr int kCosineStage =
      LayoutX::kBytes + LayoutW::kBytes + (kRounded<kMath, W> ? RoundedW::kBytes : 0);
  static constexpr int kWeightStage = LayoutG::kBytes + LayoutXt::kBytes;
  static constexpr int kCosineBytes = kCosineStages * kCosineStage;
  static constexpr int kWeightBytes = kWeightStages * kWeightStage;
  static constexpr int kStagesBytes = kCosineBytes > kWeightBytes ? kCosineBytes : kWeightBytes;

  struct Tail {
    ClassTile<T, kClasses> classes;
    T column_sums[GradientTile::kWarpsRow][3][kClasses];
    T factor[kClasses], projection[kClasses];  // of the weight gradient
    double sums[kThreads / kWarp];
  };
  // Stages, tail, and then the gradient tile of all rows where it is resident.
  static constexpr int kBytes = kStagesBytes + int(sizeof(Tail));
  static_assert(kBytes == gradient_shared_bytes(kMath, kRounded<kMath, W>),
                "the plan counts on it");
  static int shared_bytes(int64_t N, bool resident) {
    return kBytes + (resident ? int(round_up(N, GradientTile::kRows) * LayoutG::kLineBytes) : 0);
  }
  static __device__ __forceinline__ Tail& tail(unsigned char* smem) {
    return *reinterpret_cast<Tail*>(smem + kStagesBytes);
  }
};

// The first class of the block, counted in the chunk.
__device__ __forceinline__ int64_t first_column_of_block() {
  return int64_t(blockIdx.x) * kClassTile;
}

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
    p.sums
        .columns[(int64_t(blockIdx.y) * 3 + which) * p.chunk.size + first_column_of_block() + col] =
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
  const int64_t first_column = first_column_of_block();
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

// Adds up the column sums of the block's classes: factors of the weight gradient, and the gradients
// of bias and kappa.
template <class K>
__device__ __forceinline__ void finish_columns(const typename K::Params& p, unsigned char* smem) {
  using T = typename K::T;
  const CudaHead& head = p.head;
  auto& tail = K::tail(smem);
  const bool both = p.work.gradient && p.work.weight;
  const int64_t first_slot = both ? blockIdx.y : 0, slots = both ? 1 : p.work.row_groups;
  const bool per_class_kappa = p.out.kappa.data && head.kappa.stride != 0;
  for (int i = threadIdx.x; i < K::kClasses; i += K::kThreads) {
    const int64_t column = first_column_of_block() + i, c = p.chunk.begin + column;
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
  const int64_t first_column = first_column_of_block();
  const int64_t all_tiles = (head.D + WeightTile::kCols - 1) / WeightTile::kCols;
  const int64_t per_split = (all_tiles + p.work.feature_splits - 1) / p.work.feature_splits;
  const int64_t first_tile = blockIdx.y * per_split, left = all_tiles - first_tile;
  const int tiles = int(left < per_split ? left : per_split);
  T acc[WeightTile::kFragsRow][WeightTile::kFragsCol][4];
  clear(acc);
  TileLoader<LayoutG, K::kThreads> load_g(gradient);
  TileLoader<LayoutXt, K::kThreads> load_x(x);
  const auto load_a = [&](int, int step, int stage) {
    if (!p.work.resident)
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
    if (p.work.resident) g_smem = smem + K::kBytes + step * K::kDepth * LayoutG::kLineBytes;
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

// A block has 64 classes. It makes the gradient tiles of its rows, or the weight gradient from
// those of all rows, or both in turn.
template <Math kMath, class W>
__global__ void __launch_bounds__(GradientTile<kMath>::kThreads, kMath == Math::kF64 ? 1 : 2)
    class_gradient(const __grid_constant__ ClassGradientParams<typename MathTraits<kMath>::Acc> p) {
  using K = ClassGradient<kMath, W>;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  if (p.work.gradient) make_gradient_tiles<K>(p, smem);
  if (!p.work.weight) return;
  finish_columns<K>(p, smem);
  if (p.out.weight.data) make_weight_gradient<K>(p, smem);
}

}  // namespace

template <class T>
cudaError_t launch_class_gradient(const ClassGradientParams<T>& p, const Plan& plan,
                                  cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.chunk.count, kClassTile);
  const int64_t sharers = p.work.weight ? p.work.feature_splits : p.work.row_groups;
  const dim3 grid{unsigned(tiles), unsigned(sharers)};
  return with_math_of<T>(plan.math, p.head.weight.dtype, [&](auto math, auto weight) {
    constexpr Math kMath = decltype(math)::value;
    using W = decltype(weight);
    return launch_kernel(class_gradient<kMath, W>, grid, GradientTile<kMath>::kThreads,
                         ClassGradient<kMath, W>::shared_bytes(p.head.N, plan.resident), stream, p);
  });
}
template cudaError_t launch_class_gradient(const ClassGradientParams<float>&, const Plan&,
                                           cudaStream_t);
template cudaError_t launch_class_gradient(const ClassGradientParams<double>&, const Plan&,
                                           cudaStream_t);

}  // namespace tvmf::sm80
