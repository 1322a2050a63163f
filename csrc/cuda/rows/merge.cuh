// Merges partial statistics of rows and makes their losses, in blocks of their own or in the last
// block that has made statistics.
#pragma once

#include "cuda/class_terms.cuh"
#include "cuda/rows/rows.cuh"

namespace tvmf::rows {

// A reduced loss, by the sums of the losses and of their weights.
template <class T, class Params>
__device__ __forceinline__ void store_loss(const Params& p, const double (&totals)[2]) {
  *static_cast<T*>(p.out.loss) =
      T(p.options.reduction == Reduction::kMean ? totals[0] / totals[1] : totals[0]);
}
template <class Params>
__device__ __forceinline__ bool reduces_loss(const Params& p) {
  return p.out.loss && p.options.reduction != Reduction::kNone;
}

// A team merges the partial statistics of `count` rows from `begin` on, each in a fixed order, and
// adds what its threads have to the sums of the losses and of their weights. Where there are few
// rows, several lanes share one, so that all loads are in flight in one or two batches. The
// parameters are FinishParams or have its members of the same names. `smem` holds one number for
// each warp.
template <class T, class Team, class Params>
__device__ __forceinline__ void merge_rows(const Params& p, int64_t begin, int64_t count,
                                           double* smem, double (&totals)[2]) {
  constexpr int kLoads = sizeof(T) == 4 ? 16 : 4;
  const CudaHead& head = p.head;
  const bool smoothed = p.out.loss && p.options.label_smoothing > 0, ranked = p.out.others;
  double omega_sum[1] = {};
  if (smoothed && head.class_weight.data) {
    for_values<T, Team>(head.class_weight, head.C, [&](T omega) { omega_sum[0] += omega; });
    block_sums<Team>(omega_sum, smem);
  } else if (smoothed) {
    omega_sum[0] = head.class_weight.value * double(head.C);
  }

  // A warp has `rows` neighbouring rows, each shared by `parts` lanes.
  int parts = kWarp;
  const int64_t left = head.N - begin, end = begin + (left < count ? left : count);
  while (parts > 1 && parts * count > Team::threads()) parts /= 2;
  const int rows = kWarp / parts, lane = Team::thread() % kWarp, part = lane / rows;
  for (int64_t first = begin; first < end; first += Team::threads() / parts) {
    const int64_t n = first + Team::thread() / kWarp * rows + lane % rows;
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
}

}  // namespace tvmf::rows
