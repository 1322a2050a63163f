// Tiles of cosines become online statistics of the rows: one partial result for each run of
// classes.
#include "cuda/class_terms.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/mainloop.cuh"

namespace tvmf::sm80 {
namespace {

// The terms of a tile's rows that are known before the products.
template <class T, int kRows>
struct RowTile {
  T rnorm[kRows], target_score[kRows];
  int64_t label[kRows];  // as RowTargets has it
};

// Statistics of the rows over the logits so far. The first of the four lanes that share a row keeps
// them.
template <class T, int kRows>
struct StatisticTile {
  T max[kRows], sum_exp[kRows], sum[kRows];
  int rank[kRows];
};

template <Math kMath, class W, class Shape>
struct StatisticsLayout {
  using X = typename MathTraits<kMath>::X;
  using T = typename MathTraits<kMath>::Acc;
  using LayoutX = OperandTile<X, Shape::kRows, kMath, false>;
  using LayoutW = OperandTile<W, Shape::kCols, kMath, false>;
  using RoundedW = OperandTile<X, Shape::kCols, kMath, false>;
  using OwnClasses = HalfLines<LayoutW, Shape::kThreads>;  // whose weights a thread reads
  static constexpr int kStageBytes =
      LayoutX::kBytes + LayoutW::kBytes + (kRounded<kMath, W> ? RoundedW::kBytes : 0);

  struct Tail {
    ClassTile<T, Shape::kCols> classes;
    RowTile<T, Shape::kRows> rows;
    StatisticTile<T, Shape::kRows> statistics[Shape::kWarpsCol];
  };
  static constexpr int kStagesBytes = kStages<kMath, W> * kStageBytes;
  static constexpr int kBytes = kStagesBytes + int(sizeof(Tail));
};

// At least so many blocks share a multiprocessor: as many as have enough registers.
template <Math kMath, class Shape>
constexpr int kBlocks = kMath == Math::kF64 || Shape::kCols == kLargeTile ? 2 : 4;

// A block has kRows rows and walks a run of class tiles. Blocks of the same run read the same
// weights at about the same time, so that these cross the memory interface once.
template <Math kMath, class W, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, kBlocks<kMath, Shape>)
    row_statistics(const __grid_constant__ StatisticsParams<typename MathTraits<kMath>::Acc> p) {
  using Smem = StatisticsLayout<kMath, W, Shape>;
  using X = typename Smem::X;
  using T = typename Smem::T;
  using LayoutX = typename Smem::LayoutX;
  using LayoutW = typename Smem::LayoutW;
  using RoundedW = typename Smem::RoundedW;
  using OwnClasses = typename Smem::OwnClasses;
  constexpr int kRowsPerLane = 2 * Shape::kFragsRow;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& tail = *reinterpret_cast<typename Smem::Tail*>(smem + Smem::kStagesBytes);
  const CudaHead& head = p.head;
  const Lane lane = Lane::of<Shape>();
  const int first_row = int(blockIdx.x) * Shape::kRows;
  const int per_split = int(p.tiles_per_split), first_tile = int(blockIdx.y) * per_split;
  const int left = int((head.C + Shape::kCols - 1) / Shape::kCols) - first_tile;
  const int tiles = left < per_split ? left : per_split;
  const auto x = Operand<X>::of(head.x, head.N, head.D);
  const auto weight = Operand<W>::of(head.weight, head.C, head.D);
  const T scale = Scale<T>::of(head).value;

  // Fetch the rows' terms, and start their statistics.
  for (int i = threadIdx.x; i < Shape::kRows; i += Shape::kThreads) {
    const int n = first_row + i;
    const bool inside = n < head.N;
    tail.rows.rnorm[i] = inside ? p.saved.x_rnorm[n] : T(0);
    tail.rows.target_score[i] = inside ? p.targets.score[n] : T(0);
    tail.rows.label[i] = inside ? p.targets.label[n] : kIgnored;
    for (auto& statistics : tail.statistics) {
      statistics.max[i] = kLowest<T>;
      statistics.sum_exp[i] = statistics.sum[i] = 0;
      statistics.rank[i] = 0;
    }
  }

  T acc[Shape::kFragsRow][Shape::kFragsCol][4];
  clear(acc);
  T squares[OwnClasses::kOwn] = {};

  TileLoader<LayoutX, Shape::kThreads> load_x(x);
  TileLoader<LayoutW, Shape::kThreads> load_w(weight);
  const auto load_a = [&](int, int step, int stage) {
    load_x.load(first_row, int64_t(step) * kTileD<kMath>, step == 0,
                smem + stage * Smem::kStageBytes);
  };
  const auto load_b = [&](int tile, int step, int stage) {
    load_w.load(int64_t(first_tile + tile) * Shape::kCols, int64_t(step) * kTileD<kMath>, step == 0,
                smem + stage * Smem::kStageBytes + LayoutX::kBytes);
  };
  const auto start = [&](int tile) {
    const int64_t c = int64_t(first_tile + tile) * Shape::kCols;
    for (int i = threadIdx.x; i < Shape::kCols; i += Shape::kThreads) {
      tail.classes.set(i, ClassValues<T>::of(head, c + i, scale));
      if constexpr (kUnitWeights<kMath, W>)
        tail.classes.rnorm[i] = c + i < head.C ? p.saved.weight_rnorm[c + i] : T(0);
    }
    if constexpr (kUnitWeights<kMath, W>) __syncthreads();
  };
  const auto multiply = [&](int, int stage) {
    const unsigned char* x_smem = smem + stage * Smem::kStageBytes;
    const unsigned char* w_smem = x_smem + LayoutX::kBytes;
    if constexpr (kRounded<kMath, W>) {
      multiply_stage<kMath, Shape, LayoutX, RoundedW>(x_smem, w_smem + LayoutW::kBytes, lane, acc);
    } else {
      multiply_stage<kMath, Shape, LayoutX, LayoutW>(x_smem, w_smem, lane, acc);
      add_squares<kMath, LayoutW, Shape::kThreads>(w_smem, squares);
    }
  };
  const auto finish = [&](int tile) {
    const int64_t first_class = int64_t(first_tile + computed_here(tile)) * Shape::kCols;
    const int64_t classes_left = head.C - first_class;
    const int classes =
        classes_left < Shape::kCols ? int(classes_left) : Shape::kCols;  // in this tile

    // Finish the norms of the weights. The first row of blocks saves them for the backward pass.
    if constexpr (!kUnitWeights<kMath, W>) {
#pragma unroll
      for (int own = 0; own < OwnClasses::kOwn; ++own) {
        const T sum = squares[own] + __shfl_xor_sync(0xffffffff, squares[own], 1);
        squares[own] = 0;
        if (OwnClasses::side() != 0) continue;
        const int col = OwnClasses::first() + own * OwnClasses::kStep;
        const T rnorm = rnorm_of(sum);
        tail.classes.rnorm[col] = rnorm;
        if (blockIdx.x == 0 && first_class + col < head.C)
          p.saved.weight_rnorm[first_class + col] = rnorm;
      }
      __syncthreads();
    }

    const int64_t kept_left = p.saved.kept - first_class;
    const int kept = kept_left < Shape::kCols ? int(kept_left) : Shape::kCols;  // in this tile
    const auto finish_rows = [&](auto all) {
      constexpr bool kAll = decltype(all)::value;
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
        const int i = r / 2, half = r % 2 * 2;
        const int row_in_tile = computed_here(lane.row<Shape>(i, r % 2));
        const int n = first_row + row_in_tile;
        const int target = column_of(tail.rows.label[row_in_tile], first_class, Shape::kCols);
        const T x_rnorm = tail.rows.rnorm[row_in_tile];
        const T target_score = tail.rows.target_score[row_in_tile];
        if (p.saved.kept > 0 && n < head.N) {
          T* product = p.saved.product + int64_t(n) * p.saved.kept + first_class;
#pragma unroll
          for (int j = 0; j < Shape::kFragsCol; ++j)
            if (lane.col<Shape>(j) < kept)
              store_as(product + lane.col<Shape>(j), Pair<T>{acc[i][j][half], acc[i][j][half + 1]});
        }

        // Products become logits.
        T sum = 0;
        int rank = 0;
#pragma unroll
        for (int j = 0; j < Shape::kFragsCol; ++j) {
          const int col = lane.col<Shape>(j);
          const auto rnorm = tail.classes.pair(tail.classes.rnorm, col);
          const auto kappa = tail.classes.pair(tail.classes.kappa, col);
          const auto offset = tail.classes.pair(tail.classes.offset, col);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = col + e;
            const T cosine = cosine_of(acc[i][j][half + e], x_rnorm,
                                       operand_rnorm<kMath, W>(e ? rnorm.high : rnorm.low));
            const T phi = similarity(cosine, e ? kappa.high : kappa.low);
            const T logit = logit_of(scale, phi, e ? offset.high : offset.low);
            acc[i][j][half + e] = logit;
            if constexpr (kAll) {
              const bool counts = c < classes && target != c;
              // Every score that is not below or equal counts as above it, NaN too.
              rank += counts && !(phi + tail.classes.bias[c] <= target_score);
              if (p.partial.with_sum && counts) sum += tail.classes.omega[c] * logit;
            }
          }
        }
        // That of the target becomes -inf. Few rows have theirs in this tile.
        if (target >= 0)
#pragma unroll
          for (int j = 0; j < Shape::kFragsCol; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (target == lane.col<Shape>(j) + e) acc[i][j][half + e] = -infinity<T>();

        // Logits become the statistics of the tile, relative to the largest logit so far.
        T tile_max = kLowest<T>;
#pragma unroll
        for (int j = 0; j < Shape::kFragsCol; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) tile_max = fmax(tile_max, acc[i][j][half + e]);
        auto& statistics = tail.statistics[lane.warp_col];
        const T first_max = lane.quad == 0 ? statistics.max[row_in_tile] : T(0);
        const T old_max = __shfl_sync(0xffffffff, first_max, lane.lane & ~3);
        const T max = larger(old_max, quad_max(tile_max));
        T sum_exp = 0;
#pragma unroll
        for (int j = 0; j < Shape::kFragsCol; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) sum_exp += exp_of(acc[i][j][half + e] - max);
        sum_exp = quad_sum(sum_exp);
        if constexpr (kAll) {
          rank = quad_sum(rank);
          if (p.partial.with_sum) sum = quad_sum(sum);
        }
        if (lane.quad == 0) {
          statistics.max[row_in_tile] = max;
          statistics.sum_exp[row_in_tile] =
              statistics.sum_exp[row_in_tile] * exp_of(old_max - max) + sum_exp;
          if constexpr (kAll) {
            statistics.sum[row_in_tile] += sum;
            statistics.rank[row_in_tile] += rank;
          }
        }
      }
    };
    if (p.partial.with_sum || p.with_rank)
      finish_rows(std::true_type{});
    else
      finish_rows(std::false_type{});
    clear(acc);
  };
  const int steps = int((head.D + kTileD<kMath> - 1) / kTileD<kMath>);
  if constexpr (kRounded<kMath, W>) {
    // Unit rows are rounded, or the squares of what was rounded are summed.
    [[maybe_unused]] float unit[OwnClasses::kOwn];
    const auto round = [&](int tile, int step, int stage) {
      if (kUnitWeights<kMath, W> && step == 0) {
        const int64_t first = int64_t(first_tile + tile) * Shape::kCols + OwnClasses::first();
#pragma unroll
        for (int own = 0; own < OwnClasses::kOwn; ++own) {
          const int64_t c = first + own * OwnClasses::kStep;
          unit[own] = unit_scale(c < head.C ? p.saved.weight_rnorm[c] : 0.0f);
        }
      }
      unsigned char* w_smem = smem + stage * Smem::kStageBytes + LayoutX::kBytes;
      round_lines<LayoutW, RoundedW, Shape::kThreads>(
          w_smem, w_smem + LayoutW::kBytes, [&](int own, FourFloats four) {
            if constexpr (kUnitWeights<kMath, W>)
              for (float& value : four.value) value *= unit[own];
            const FourRounded rounded = round_four<kMath>(four);
            if constexpr (!kUnitWeights<kMath, W>) add_squares_of(rounded, squares[own]);
            return rounded;
          });
    };
    pipeline<kStages<kMath, W>>(tiles, steps, load_a, load_b, start, round, multiply, finish);
  } else {
    pipeline<kStages<kMath, W>>(tiles, steps, load_a, load_b, start, Nothing{}, multiply, finish);
  }

  // Merge the warps that have the same rows, in order.
  __syncthreads();
  for (int i = threadIdx.x; i < Shape::kRows; i += Shape::kThreads) {
    const int n = first_row + i;
    if (n >= head.N) break;
    T max = kLowest<T>, sum_exp = 0, sum = 0;
    int rank = 0;
    for (const auto& statistics : tail.statistics) max = larger(max, statistics.max[i]);
    for (const auto& statistics : tail.statistics) {
      sum_exp += statistics.sum_exp[i] * exp_of(statistics.max[i] - max);
      sum += statistics.sum[i];
      rank += statistics.rank[i];
    }
    const int64_t at = blockIdx.y * head.N + n;
    p.partial.max[at] = max;
    p.partial.sum_exp[at] = sum_exp;
    p.partial.rank[at] = rank;
    if (p.partial.with_sum) p.partial.sum[at] = sum;
  }
}

}  // namespace

template <class T>
cudaError_t launch_statistics(const StatisticsParams<T>& p, const Plan& plan, cudaStream_t stream) {
  return with_math_of<T>(plan.math, p.head.weight.dtype, [&](auto math, auto weight) {
    constexpr Math kMath = decltype(math)::value;
    using W = decltype(weight);
    return with_tile<kMath>(plan.tile, [&](auto shape) {
      using Shape = decltype(shape);
      const dim3 grid(unsigned(plan.row_tiles), unsigned(plan.class_splits));
      return launch_kernel(row_statistics<kMath, W, Shape>, grid, Shape::kThreads,
                           StatisticsLayout<kMath, W, Shape>::kBytes, stream, p);
    });
  });
}
template cudaError_t launch_statistics(const StatisticsParams<float>&, const Plan&, cudaStream_t);
template cudaError_t launch_statistics(const StatisticsParams<double>&, const Plan&, cudaStream_t);

}  // namespace tvmf::sm80
