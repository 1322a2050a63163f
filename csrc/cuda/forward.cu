// Forward pass in three launches, or four: norms and target products of the rows; tiles of cosines
// to online row statistics, one partial result for each run of classes; their merge in order, and
// the loss.
#include <cmath>

#include "cuda/passes.cuh"
#include "cuda/sm80/mainloop.cuh"
#include "cuda/sm90/sm90.h"

namespace tvmf {
namespace {

constexpr int kPrepareThreads = 128, kPrepareLoads = 4;

// A block a row, and blocks that arrange them: its norm, its product with its target's weight, and
// that class's score. It is all latency, so the loads of a row of up to 2048 features are under way
// at once: with four blocks promised the compiler has the registers for it, where it would put each
// load before its use.
template <Math kMath, class W>
__global__ void __launch_bounds__(kPrepareThreads, 4)
    prepare_rows(const __grid_constant__ ForwardParams<typename MathTraits<kMath>::Acc> p) {
  using X = typename MathTraits<kMath>::X;
  using T = typename MathTraits<kMath>::Acc;
  const CudaHead& head = p.head;
  const int64_t n = blockIdx.x;
  if (n >= head.N) {
    arrange(head, p.arranged, (n - head.N) * kPrepareThreads + threadIdx.x);
    return;
  }
  const auto x = Operand<X>::of(head.x.data, head.x.row_stride, head.x.col_stride, head.N, head.D);
  const auto weight = Operand<W>::of(head.weight.data, head.weight.row_stride,
                                     head.weight.col_stride, head.C, head.D);

  const int64_t y = head.target[n * head.target_stride];
  const bool ignored = y == head.ignore_index, valid = !ignored && y >= 0 && y < head.C;
  const T kappa = valid ? value_at<T>(head.kappa, y) : T(0);
  const T bias = valid ? value_at<T>(head.bias, y) : T(0);
  const X* x_line = x.data + n * x.line_stride;
  const W* w_line = weight.data + (valid ? y : 0) * weight.line_stride;
  T sums[3] = {};  // |x|^2, |w|^2, <x, w>
  const auto add_runs = [&](auto run) {
    constexpr int kRun = decltype(run)::value;
    struct XRun {
      X element[kRun];
    };
    struct WRun {
      W element[kRun];
    };
    constexpr int64_t kStep = kPrepareThreads * kRun;
    for (int64_t first = threadIdx.x * kRun; first < head.D; first += kPrepareLoads * kStep) {
      XRun xs[kPrepareLoads];
      WRun ws[kPrepareLoads];
#pragma unroll
      for (int load = 0; load < kPrepareLoads; ++load) {
        const int64_t k = first + load * kStep;
        const bool inside = k < head.D;
        xs[load] = inside ? load_as<XRun>(x_line + k * x.element_stride) : XRun{};
        ws[load] = inside && valid ? load_as<WRun>(w_line + k * weight.element_stride) : WRun{};
      }
#pragma unroll
      for (int load = 0; load < kPrepareLoads; ++load)
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const T xi = as_operand<kMath>(to_number<T>(xs[load].element[i]));
          const T wi = as_operand<kMath>(to_number<T>(ws[load].element[i]));
          sums[0] = fma(xi, xi, sums[0]);
          sums[1] = fma(wi, wi, sums[1]);
          sums[2] = fma(xi, wi, sums[2]);
        }
    }
  };
  constexpr int kRun = 16 / (sizeof(W) > sizeof(X) ? sizeof(W) : sizeof(X));
  if (x.vectors && weight.vectors && head.D % kRun == 0)
    add_runs(std::integral_constant<int, kRun>{});
  else
    add_runs(std::integral_constant<int, 1>{});
  block_sums(sums, static_cast<T*>(shared_memory()));
  if (threadIdx.x != 0) return;

  const auto [x_squares, w_squares, product] = sums;
  const T x_rnorm = rnorm_of(x_squares);
  T score = 0;
  if (valid) {
    const T cosine = cosine_of(product, x_rnorm, rnorm_of(w_squares));
    score = similarity(cosine, kappa) + bias;
  }
  // The context must survive a wrong label: its row is NaN, and the host finds the flag.
  const bool wrong = !ignored && !valid;
  if (wrong) raise_flag(head.bad_label);
  p.saved[p.layout.x_rnorm + n] = x_rnorm;
  p.saved[p.layout.target_product + n] = product;
  p.label[n] = valid ? y : ignored ? -1 : -2;
  p.target_score[n] = score;
  p.target[n] = wrong ? T(NAN) : T(0);
}

template <Math kMath, class W, class Shape>
struct StatisticsPlan {
  using X = typename MathTraits<kMath>::X;
  using T = typename MathTraits<kMath>::Acc;
  using LayoutX = OperandTile<X, Shape::kRows, kMath, false>;
  using LayoutW = OperandTile<W, Shape::kCols, kMath, false>;
  static constexpr int kStageBytes = LayoutX::kBytes + LayoutW::kBytes;
  static_assert(Shape::kThreads == 2 * Shape::kCols, "two threads square a class's weights");

  struct Tail {
    ClassTile<T, Shape::kCols> classes;
    RowTile<T, Shape::kRows> rows;
    StatisticTile<T, Shape::kRows> statistics[Shape::kWarpsCol];
  };
  static constexpr int kStagesBytes = kStages<kMath, W> * kStageBytes;
  static constexpr int kBytes = kStagesBytes + int(sizeof(Tail));
};

// A block has kRows rows and walks a run of class tiles; blocks of the same run read the same
// weights at about the same time, so that these cross HBM once.
template <Math kMath, class W, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    row_statistics(const __grid_constant__ ForwardParams<typename MathTraits<kMath>::Acc> p) {
  using Plan = StatisticsPlan<kMath, W, Shape>;
  using X = typename Plan::X;
  using T = typename Plan::T;
  using LayoutX = typename Plan::LayoutX;
  using LayoutW = typename Plan::LayoutW;
  constexpr int kRowsPerLane = 2 * Shape::kFragsRow;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& tail = *reinterpret_cast<typename Plan::Tail*>(smem + Plan::kStagesBytes);
  const CudaHead& head = p.head;
  const Lane lane = Lane::of<Shape>();
  const int first_row = int(blockIdx.x) * Shape::kRows;
  const int per_split = int(p.tiles_per_split), first_tile = int(blockIdx.y) * per_split;
  const int left = int((head.C + Shape::kCols - 1) / Shape::kCols) - first_tile;
  const int tiles = left < per_split ? left : per_split;
  const auto x = Operand<X>::of(head.x.data, head.x.row_stride, head.x.col_stride, head.N, head.D);
  const auto weight = Operand<W>::of(head.weight.data, head.weight.row_stride,
                                     head.weight.col_stride, head.C, head.D);
  const T scale = Scale<T>::of(head).value;

  // Fetch the rows' terms, and start their statistics.
  for (int i = threadIdx.x; i < Shape::kRows; i += Shape::kThreads) {
    const int n = first_row + i;
    const bool inside = n < head.N;
    tail.rows.rnorm[i] = inside ? p.saved[p.layout.x_rnorm + n] : T(0);
    tail.rows.target_product[i] = inside ? p.saved[p.layout.target_product + n] : T(0);
    tail.rows.target_score[i] = inside ? p.target_score[n] : T(0);
    tail.rows.label[i] = inside ? p.label[n] : -1;
    for (auto& statistics : tail.statistics) {
      statistics.max[i] = kLowest<T>;
      statistics.sum_exp[i] = statistics.sum[i] = 0;
      statistics.rank[i] = 0;
    }
  }

  T acc[Shape::kFragsRow][Shape::kFragsCol][4];
  clear(acc);
  T squares = 0;

  const auto load = [&](int tile, int step, int stage) {
    unsigned char* to = smem + stage * Plan::kStageBytes;
    const int64_t d = step * kTileD<kMath>, c = int64_t(first_tile + tile) * Shape::kCols;
    load_operand<LayoutX, Shape::kThreads>(x, first_row, d, to);
    load_operand<LayoutW, Shape::kThreads>(weight, c, d, to + LayoutX::kBytes);
  };
  const auto start = [&](int tile) {
    const int64_t c = int64_t(first_tile + tile) * Shape::kCols;
    for (int i = threadIdx.x; i < Shape::kCols; i += Shape::kThreads)
      tail.classes.set(i, ClassValues<T>::of(head, c + i, scale));
  };
  const auto multiply = [&](int, int stage) {
    const unsigned char* x_smem = smem + stage * Plan::kStageBytes;
    const unsigned char* w_smem = x_smem + LayoutX::kBytes;
    multiply_stage<kMath, Shape, LayoutX, LayoutW>(x_smem, w_smem, lane, acc);
    add_squares<kMath, LayoutW>(w_smem, squares);
  };
  const auto finish = [&](int tile) {
    const int64_t first_class = int64_t(first_tile + tile) * Shape::kCols;

    // Finish the weights' norms; the first row of blocks keeps them for the backward pass.
    squares += __shfl_xor_sync(0xffffffff, squares, 1);
    if (threadIdx.x % 2 == 0) {
      const int col = threadIdx.x / 2;
      const T rnorm = rnorm_of(squares);
      tail.classes.rnorm[col] = rnorm;
      if (blockIdx.x == 0 && first_class + col < head.C)
        p.saved[p.layout.weight_rnorm + first_class + col] = rnorm;
    }
    squares = 0;
    __syncthreads();

#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      const int i = r / 2, half = r % 2 * 2, row_in_tile = lane.row<Shape>(i, r % 2);
      const int n = first_row + row_in_tile;
      const int64_t label = tail.rows.label[row_in_tile] - first_class;
      const T x_rnorm = tail.rows.rnorm[row_in_tile];
      const T target_score = tail.rows.target_score[row_in_tile];

      // Products to logits; the target's product is the one that the backward pass will see.
      T tile_max = kLowest<T>, sum = 0;
      int rank = 0;
#pragma unroll
      for (int j = 0; j < Shape::kFragsCol; ++j) {
        const int col = lane.col<Shape>(j);
        Pair<T> product{acc[i][j][half], acc[i][j][half + 1]};
        if (label == col) product.low = tail.rows.target_product[row_in_tile];
        if (label == col + 1) product.high = tail.rows.target_product[row_in_tile];
        if (first_class + col < p.kept && n < head.N)
          store_as(p.saved + p.layout.product + int64_t(n) * p.kept + first_class + col, product);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = col + e;
          const T cosine =
              cosine_of(e ? product.high : product.low, x_rnorm, tail.classes.rnorm[c]);
          const T phi = similarity(cosine, tail.classes.kappa[c]);
          const T logit = logit_of(scale, phi, tail.classes.offset[c]);
          acc[i][j][half + e] = logit;
          tile_max = larger(tile_max, logit);
          if (first_class + c < head.C) {
            // What is not below or equal is above: NaN too.
            if (label != c && !(phi + tail.classes.bias[c] <= target_score)) ++rank;
            if (p.with_sum) sum += tail.classes.omega[c] * logit;
            if (label == c) p.target[n] = logit;
          }
        }
      }

      // Logits to the statistics of the tile, relative to the largest logit so far.
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
      rank = quad_sum(rank);
      if (p.with_sum) sum = quad_sum(sum);
      if (lane.quad == 0) {
        statistics.max[row_in_tile] = max;
        statistics.sum_exp[row_in_tile] =
            statistics.sum_exp[row_in_tile] * exp_of(old_max - max) + sum_exp;
        statistics.sum[row_in_tile] += sum;
        statistics.rank[row_in_tile] += rank;
      }
    }
    clear(acc);
  };
  const int steps = int((head.D + kTileD<kMath> - 1) / kTileD<kMath>);
  pipeline<kStages<kMath, W>>(tiles, steps, load, start, multiply, finish);

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
    p.max[at] = max;
    p.sum_exp[at] = sum_exp;
    p.rank[at] = rank;
    if (p.with_sum) p.sum[at] = sum;
  }
}

constexpr int kFinishThreads = 512;

template <class T>
__device__ __forceinline__ void store_loss(const ForwardParams<T>& p, const double (&totals)[2]) {
  *static_cast<T*>(p.out.loss) =
      T(p.options.reduction == Reduction::kMean ? totals[0] / totals[1] : totals[0]);
}

// A block some rows: merges each row's runs of classes in a fixed order, and sums the losses. With
// few rows several lanes share one, so that all loads are under way in one or two batches.
//   loss_n = (1 - e) omega_y (lse - target) + e / C (lse sum_c omega_c - sum)
template <class T>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish_rows(const __grid_constant__ ForwardParams<T> p) {
  constexpr int kLoads = sizeof(T) == 4 ? 16 : 4;
  double* smem = static_cast<double*>(shared_memory());
  const CudaHead& head = p.head;
  const bool smoothed = p.out.loss && p.options.label_smoothing > 0, ranked = p.out.lse;
  const double keep = 1 - p.options.label_smoothing, smooth = p.options.label_smoothing / head.C;
  double omega_sum[1] = {};
  if (smoothed && head.class_weight.data) {
    for_values<T>(head.class_weight, head.C, [&](T omega) { omega_sum[0] += omega; });
    block_sums(omega_sum, smem);
  } else if (smoothed) {
    omega_sum[0] = head.class_weight.value * double(head.C);
  }

  // A warp has `rows` neighbouring rows, and `parts` lanes for each.
  int parts = kWarp;
  const int64_t begin = blockIdx.x * p.finish_rows, left = head.N - begin;
  const int64_t end = begin + (left < p.finish_rows ? left : p.finish_rows);
  while (parts > 1 && parts * p.finish_rows > kFinishThreads) parts /= 2;
  const int rows = kWarp / parts, lane = threadIdx.x % kWarp, part = lane / rows;
  double totals[2] = {};  // of the losses, of their weights
  for (int64_t first = begin; first < end; first += kFinishThreads / parts) {
    const int64_t n = first + int(threadIdx.x) / kWarp * rows + lane % rows;
    const bool inside = n < end;
    const int64_t label = inside ? p.label[n] : -1;
    const T target = inside ? p.target[n] : T(0);
    T own_max = kLowest<T>, sum_exp = 0, sum = 0;
    if (p.target_apart && label >= 0 && part == 0) own_max = target, sum_exp = 1;
    int64_t rank = 0;
    for (int64_t s = part; inside && s < p.splits; s += kLoads * parts) {
      T maxs[kLoads], sum_exps[kLoads], sums[kLoads];
      int ranks[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const bool there = s + k * parts < p.splits;
        const int64_t at = (s + k * parts) * head.N + n;
        maxs[k] = there ? p.max[at] : kLowest<T>;
        sum_exps[k] = there ? p.sum_exp[at] : T(0);
        ranks[k] = there && ranked ? p.rank[at] : 0;
        sums[k] = there && p.with_sum ? p.sum[at] : T(0);
      }
      T max = own_max;
#pragma unroll
      for (int k = 0; k < kLoads; ++k) max = larger(max, maxs[k]);
      sum_exp *= exp_of(own_max - max);
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        sum_exp += sum_exps[k] * exp_of(maxs[k] - max);
        rank += ranks[k];
        sum += sums[k];
      }
      own_max = max;
    }
    T max = own_max;
    for (int mask = rows; mask < kWarp; mask *= 2)
      max = larger(max, __shfl_xor_sync(0xffffffff, max, mask));
    sum_exp *= exp_of(own_max - max);
    for (int mask = rows; mask < kWarp; mask *= 2) {
      sum_exp += __shfl_xor_sync(0xffffffff, sum_exp, mask);
      rank += __shfl_xor_sync(0xffffffff, rank, mask);
      sum += __shfl_xor_sync(0xffffffff, sum, mask);
    }
    if (!inside || part != 0) continue;

    p.saved[p.layout.max + n] = max;
    p.saved[p.layout.sum_exp + n] = sum_exp;
    const double log_sum = log(sum_exp);
    if (p.out.lse) {
      static_cast<T*>(p.out.lse)[n] = T(max + log_sum);
      static_cast<T*>(p.out.target)[n] = target;
      if (p.out.sum) static_cast<T*>(p.out.sum)[n] = sum;
      p.out.rank[n] = label == -1 ? -1 : label == -2 || rank > head.C - 1 ? head.C - 1 : rank;
    }
    if (p.out.loss) {
      double loss = 0;
      if (label != -1) {
        // max - target first: of a row that fits well it is exactly 0.
        const double omega = label == -2 ? 1.0 : double(value_at<T>(head.class_weight, label));
        loss = keep * omega * (double(max - target) + log_sum);
        if (smoothed) loss += smooth * (omega_sum[0] * (max + log_sum) - sum);
        totals[1] += omega;
      }
      if (p.options.reduction == Reduction::kNone)
        static_cast<T*>(p.out.loss)[n] = T(loss);
      else
        totals[0] += loss;
    }
  }
  if (!p.out.loss || p.options.reduction == Reduction::kNone) return;
  block_sums(totals, smem);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    store_loss(p, totals);
  else
    store_as(p.totals + 2 * blockIdx.x, Pair<double>{totals[0], totals[1]});
}

// One warp: the blocks' sums of losses in order.
template <class T>
__global__ void __launch_bounds__(kWarp) finish_loss(const __grid_constant__ ForwardParams<T> p) {
  const int64_t blocks = (p.head.N + p.finish_rows - 1) / p.finish_rows;
  double totals[2] = {};
  for (int64_t i = threadIdx.x; i < blocks; i += kWarp) {
    const auto pair = load_as<Pair<double>>(p.totals + 2 * i);
    totals[0] += pair.low;
    totals[1] += pair.high;
  }
  totals[0] = warp_sum(totals[0]);
  totals[1] = warp_sum(totals[1]);
  if (threadIdx.x == 0) store_loss(p, totals);
}

template <Math kMath, class W, class Shape, class T>
cudaError_t launch_statistics(const ForwardParams<T>& p, const CudaPlan& plan,
                              cudaStream_t stream) {
  const dim3 grid(unsigned(plan.row_tiles), unsigned(plan.class_splits));
  return launch_kernel(row_statistics<kMath, W, Shape>, grid, Shape::kThreads,
                       StatisticsPlan<kMath, W, Shape>::kBytes, stream, p);
}

template <class T>
cudaError_t finish(const ForwardParams<T>& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.head.N, p.finish_rows);
  const cudaError_t error = launch_kernel(finish_rows<T>, dim3(unsigned(blocks)), kFinishThreads,
                                          2 * kFinishThreads / kWarp * 8, stream, p);
  if (error != cudaSuccess || blocks == 1 || !p.out.loss || p.options.reduction == Reduction::kNone)
    return error;
  return launch_kernel(finish_loss<T>, dim3(1), kWarp, 0, stream, p);
}

template <Math kMath, class W>
cudaError_t forward(const CudaHead& head, const LossOptions& options, const CudaPlan& plan,
                    const CudaStatistics& out, void* saved, void* workspace, cudaStream_t stream) {
  using T = typename MathTraits<kMath>::Acc;
  const ForwardWorkspace at(plan);
  unsigned char* base = static_cast<unsigned char*>(workspace);
  const auto in = [&](int64_t offset) { return reinterpret_cast<T*>(base + offset); };
  const ForwardParams<T> p{head,
                           options,
                           out,
                           SavedLayout(head.N, head.C, plan.problem.kept),
                           static_cast<T*>(saved),
                           plan.problem.kept,
                           plan.problem.with_sum,
                           plan.tiles_per_split,
                           plan.class_splits,
                           reinterpret_cast<int64_t*>(base + at.label),
                           in(at.target_score),
                           in(at.target),
                           in(at.max),
                           in(at.sum_exp),
                           in(at.sum),
                           reinterpret_cast<int*>(base + at.rank),
                           plan.hopper.used,
                           {plan.hopper.rows, plan.hopper.columns,
                            plan.hopper.used ? base + at.arranged : nullptr, nullptr},
                           plan.finish_rows,
                           reinterpret_cast<double*>(base + at.totals)};
  const int64_t arranging = ceil_div(p.arranged.chunks(), kPrepareThreads);
  cudaError_t error =
      launch_kernel(prepare_rows<kMath, W>, dim3(unsigned(head.N + arranging)), kPrepareThreads,
                    3 * kPrepareThreads / kWarp * int(sizeof(T)), stream, p);
  if (error != cudaSuccess) return error;
  if constexpr (sizeof(W) > sizeof(typename MathTraits<kMath>::X)) {
    if (plan.hopper.used) {
      error = sm90::row_statistics(p, plan, stream);
      return error == cudaSuccess ? finish(p, stream) : error;
    }
  }
  if constexpr (kTensorCores<kMath>) {
    if (plan.tile == LargeTile::kRows)
      error = launch_statistics<kMath, W, LargeTile>(p, plan, stream);
    else
      error = launch_statistics<kMath, W, SmallTile>(p, plan, stream);
  } else {
    error = launch_statistics<kMath, W, SmallTile>(p, plan, stream);
  }
  return error == cudaSuccess ? finish(p, stream) : error;
}

}  // namespace

cudaError_t cuda_forward(const CudaHead& head, const LossOptions& options, const CudaPlan& plan,
                         const CudaStatistics& out, void* saved, void* workspace,
                         cudaStream_t stream) {
  return with_math(plan, [&](auto math, auto weight) {
    return forward<decltype(math)::value, decltype(weight)>(head, options, plan, out, saved,
                                                            workspace, stream);
  });
}

#ifndef TVMF_SIMT
#define TVMF_TEXT(...) #__VA_ARGS__
#define TVMF_EXPAND(...) TVMF_TEXT(__VA_ARGS__)

// "800,900": what nvcc was really asked for.
const char* cuda_archs() { return TVMF_EXPAND(__CUDA_ARCH_LIST__); }
#endif

}  // namespace tvmf
