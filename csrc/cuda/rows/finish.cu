#include "cuda/class_terms.cuh"
#include "cuda/rows/rows.cuh"

namespace tvmf::rows {
namespace {

constexpr int kThreads = 512;

template <class T>
__device__ __forceinline__ void store_loss(const FinishParams<T>& p, const double (&totals)[2]) {
  *static_cast<T*>(p.out.loss) =
      T(p.options.reduction == Reduction::kMean ? totals[0] / totals[1] : totals[0]);
}

// A block merges the partial statistics of each of its rows in a fixed order, and sums the losses.
// Where there are few rows, several lanes share one, so that all loads are in flight in one or two
// batches.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    finish_rows(const __grid_constant__ FinishParams<T> p) {
  constexpr int kLoads = sizeof(T) == 4 ? 16 : 4;
  double* smem = static_cast<double*>(shared_memory());
  const CudaHead& head = p.head;
  const bool smoothed = p.out.loss && p.options.label_smoothing > 0, ranked = p.out.others;
  double omega_sum[1] = {};
  if (smoothed && head.class_weight.data) {
    for_values<T>(head.class_weight, head.C, [&](T omega) { omega_sum[0] += omega; });
    block_sums(omega_sum, smem);
  } else if (smoothed) {
    omega_sum[0] = head.class_weight.value * double(head.C);
  }

  // A warp has `rows` neighbouring rows, each shared by `parts` lanes.
  int parts = kWarp;
  const int64_t begin = blockIdx.x * p.block_rows, left = head.N - begin;
  const int64_t end = begin + (left < p.block_rows ? left : p.block_rows);
  while (parts > 1 && parts * p.block_rows > kThreads) parts /= 2;
  const int rows = kWarp / parts, lane = threadIdx.x % kWarp, part = lane / rows;
  double totals[2] = {};  // sums of the losses and of their weights
  for (int64_t first = begin; first < end; first += kThreads / parts) {
    const int64_t n = first + int(threadIdx.x) / kWarp * rows + lane % rows;
    const bool inside = n < end;
    const int64_t label = inside ? p.targets.label[n] : kIgnored;
    const T target = inside ? p.saved.target_logit[n] : T(0);
    T own_max = kLowest<T>, sum_exp = 0, sum = 0;
    int64_t rank = 0;
    for (int64_t s = part; inside && s < p.partial.count; s += kLoads * parts) {
      T maxs[kLoads], sum_exps[kLoads], sums[kLoads];
      int ranks[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const bool there = s + k * parts < p.partial.count;
        const int64_t at = (s + k * parts) * head.N + n;
        maxs[k] = there ? p.partial.max[at] : kLowest<T>;
        sum_exps[k] = there ? p.partial.sum_exp[at] : T(0);
        ranks[k] = there && ranked ? p.partial.rank[at] : 0;
        sums[k] = there && p.partial.with_sum ? p.partial.sum[at] : T(0);
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

    p.saved.max[n] = max;
    p.saved.sum_exp[n] = sum_exp;
    const double log_sum = log_of_sum(sum_exp);
    if (p.out.others) {
      static_cast<T*>(p.out.others)[n] = T(max + log_sum);
      static_cast<T*>(p.out.cosine)[n] = p.saved.target_cosine[n];
      if (p.out.sum) static_cast<T*>(p.out.sum)[n] = sum;
      p.out.rank[n] = label == kIgnored ? -1 : label == kWrong ? head.C - 1 : rank;
    }
    if (p.out.loss) {
      double loss = 0;
      if (label == kWrong) {
        loss = NAN;
      } else if (label != kIgnored) {
        const double omega = value_at<T>(head.class_weight, label);
        loss =
            row_loss(RowWeights::of(p.options.label_smoothing, double(head.C), omega, omega_sum[0]),
                     max, log_sum, target, sum);
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
  if (p.all_blocks == 1)
    store_loss(p, totals);
  else
    store_as(p.totals + 2 * (p.first_block + blockIdx.x), Pair<double>{totals[0], totals[1]});
}

// One warp adds up the sums of the blocks, in order.
template <class T>
__global__ void __launch_bounds__(kWarp) finish_loss(const __grid_constant__ FinishParams<T> p) {
  double totals[2] = {};
  for (int64_t i = threadIdx.x; i < p.all_blocks; i += kWarp) {
    const auto pair = load_as<Pair<double>>(p.totals + 2 * i);
    totals[0] += pair.low;
    totals[1] += pair.high;
  }
  totals[0] = warp_sum(totals[0]);
  totals[1] = warp_sum(totals[1]);
  if (threadIdx.x == 0) store_loss(p, totals);
}

}  // namespace

template <class T>
cudaError_t launch_finish(const FinishParams<T>& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.head.N, p.block_rows);
  const cudaError_t error = launch_kernel(finish_rows<T>, dim3(unsigned(blocks)), kThreads,
                                          2 * kThreads / kWarp * 8, stream, p);
  const bool reduced = p.out.loss && p.options.reduction != Reduction::kNone;
  const bool last = p.first_block + blocks == p.all_blocks;
  if (error != cudaSuccess || p.all_blocks == 1 || !last || !reduced) return error;
  return launch_kernel(finish_loss<T>, dim3(1), kWarp, 0, stream, p);
}
template cudaError_t launch_finish(const FinishParams<float>&, cudaStream_t);
template cudaError_t launch_finish(const FinishParams<double>&, cudaStream_t);

}  // namespace tvmf::rows
