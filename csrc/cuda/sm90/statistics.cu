// Forward pass on Hopper: a block walks tiles of classes with its rows, a lane's rows' statistics
// in registers. Exponentials are relative to a reference that starts a little under the target's
// logit and is raised where they overflow; the target's own is left to the merge, which makes it
// exactly 1.
#include "cuda/passes.cuh"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/sm90.h"

namespace tvmf::sm90 {
namespace {

struct StatisticsParams {
  ForwardParams<float> p;
  TensorMap weight, x;
  int class_tiles, row_blocks, walkers;  // walkers: blocks that share the tiles of their rows
};

template <class Shape>
struct StatisticsPlan {
  struct Tail {
    typename Shape::Ring ring;
    float rnorm[Shape::kRows], target_product[Shape::kRows], target_score[Shape::kRows];
    int label[Shape::kRows];
    float reference[kConsumerWarps][Shape::kProductRows];
  };
  // What the warps hand over in the end lies where the stages were.
  struct Sums {
    float sum_exp[kConsumerWarps][Shape::kProductRows], sum[kConsumerWarps][Shape::kProductRows];
    int rank[kConsumerWarps][Shape::kProductRows];
  };
  static_assert(sizeof(Sums) <= Shape::kStagesBytes);
  static constexpr int kBytes = Shape::kStagesBytes + int(sizeof(Tail));
  static_assert(kBytes <= 232448);
};

// kAll: with ranks and sums.
template <Math kMath, class Shape, bool kAll>
__global__ void __launch_bounds__(kThreads, 1)
    statistics(const __grid_constant__ StatisticsParams params) {
#ifdef TVMF_HOPPER
  using Plan = StatisticsPlan<Shape>;
  constexpr int kGroups = Shape::kProductRows / 32;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& tail = *reinterpret_cast<typename Plan::Tail*>(smem + Shape::kStagesBytes);
  const ForwardParams<float>& p = params.p;
  const CudaHead& head = p.head;
  const int walker = int(blockIdx.x) / params.row_blocks;
  const int first_row = int(blockIdx.x) % params.row_blocks * Shape::kRows;
  const int steps = int((head.D + kDepth - 1) / kDepth);
  const WgmmaLane lane = WgmmaLane::of();

  const float scale = Scale<float>::of(head).value;

  // Fetch the rows' terms.
  for (int i = threadIdx.x; i < Shape::kRows; i += kThreads) {
    const int n = first_row + i;
    const bool inside = n < head.N;
    const int64_t label = inside ? p.label[n] : -1;
    tail.rnorm[i] = inside ? p.saved[p.layout.x_rnorm + n] : 0.0f;
    tail.target_product[i] = inside ? p.saved[p.layout.target_product + n] : 0.0f;
    tail.target_score[i] = inside ? p.target_score[n] : 0.0f;
    tail.label[i] = int(label);
    // Rows without a target have no reference yet; those beyond the last need none.
    float reference = inside ? kLowest<float> : -kLowest<float>;
    if (label >= 0)
      reference = scale * p.target_score[n] + value_at<float>(head.prior, label) - 0.25f;
    constexpr int kWarps = Shape::kSplitRows ? kConsumerWarps / 2 : kConsumerWarps;
    const int first_warp = i / Shape::kProductRows * kWarps;
    for (int w = 0; w < kWarps; ++w)
      tail.reference[first_warp + w][i % Shape::kProductRows] = reference;
  }
  tail.ring.init();

  if (lane.warpgroup == kConsumers) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) {
      prefetch_map(params.weight);
      prefetch_map(params.x);
      typename Shape::Place place;
      for (int tile = walker; tile < params.class_tiles; tile += params.walkers)
        for (int step = 0; step < steps; ++step)
          Shape::copy(smem, tail.ring, place, params.weight, params.x, tile * Shape::kClasses,
                      first_row, step);
    }
  } else {
    take_registers<kConsumerRegisters>();
    const int warp_row = Shape::kSplitRows ? lane.warpgroup * Shape::kProductRows : 0;
    float* references = tail.reference[lane.warp];
    typename Shape::Place place;
    float acc[Shape::kAccumulators];
    float row_sum_exp[kGroups] = {}, row_sum[kGroups] = {};
    int row_rank[kGroups] = {};

    for (int tile = walker; tile < params.class_tiles; tile += params.walkers) {
      const int first_class = tile * Shape::kClasses +
                              (Shape::kSplitRows ? 0 : lane.warpgroup * 64) + lane.warp % 4 * 16;
      ClassPair classes;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        classes.terms[h] = ClassValues<float>::of(head, first_class + lane.group + h * 8, scale);
      float squares[2] = {};
      Shape::template multiply<kMath>(smem, tail.ring, place, lane, steps, acc, squares,
                                      [](int, int, const uint32_t*) {});

      // Finish the weights' norms; the first rows' blocks keep them for the backward pass.
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        classes.rnorm[h] = rnorm_of(quad_sum(squares[h]));
        const int c = first_class + lane.group + h * 8;
        if (first_row + warp_row == 0 && lane.quad == 0 && c < head.C)
          p.saved[p.layout.weight_rnorm + c] = classes.rnorm[h];
      }
      const unsigned targets =
          groups_with_target<kGroups>(tail.label + warp_row, first_class, lane.lane);

      float sum_exp[kGroups], sum[kGroups] = {};
      int rank[kGroups] = {};
      for (int attempt = 0;; ++attempt) {
#pragma unroll
        for (int b = 0; b < kGroups; ++b) {
          const int row = b * 32 + lane.quad * 8;  // of the warp's rows
          float x_rnorm[8], reference[8], target_score[8], v[8], total[8];
          load_rows(x_rnorm, tail.rnorm, warp_row + row);
          load_rows(reference, references, row);
          if constexpr (kAll) load_rows(target_score, tail.target_score, warp_row + row);
          int count[2] = {};
          const auto rows = [&](auto with_target) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              v[i] = total[i] = 0;
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const int c = first_class + lane.group + h * 8;
                float product = acc[accumulator_of(b, i, h)];
                bool is_target = false;
                if constexpr (decltype(with_target)::value) {
                  is_target = tail.label[warp_row + row + i] == c;
                  if (is_target) product = tail.target_product[warp_row + row + i];
                }
                const auto& terms = classes.terms[h];
                const float phi =
                    similarity(cosine_of(product, x_rnorm[i], classes.rnorm[h]), terms.kappa);
                const float logit = logit_of(scale, phi, terms.offset);
                const float e = exp_of(logit - reference[i]);
                v[i] += is_target ? 0.0f : e;
                if (is_target) p.target[first_row + warp_row + row + i] = logit;
                if constexpr (kAll) {
                  if (c < head.C) {
                    if (!is_target && !(phi + terms.bias <= target_score[i]))
                      count[i / 4] += 1 << i % 4 * 8;
                    if (p.with_sum) total[i] += terms.omega * logit;
                  }
                }
              }
            }
          };
          if (targets >> b & 1)
            rows(std::true_type{});
          else
            rows(std::false_type{});
          sum_exp[b] = sum_rows(v, lane.group);
          if constexpr (kAll) {
            if (p.with_sum) sum[b] = sum_rows(total, lane.group);
            const int low = group_sum(count[0]), high = group_sum(count[1]);
            rank[b] = (lane.group < 4 ? low : high) >> lane.group % 4 * 8 & 255;
          }
        }

        // Where exponentials overflowed, the row's largest logit becomes the reference, once.
        bool overflow = false;
#pragma unroll
        for (int b = 0; b < kGroups; ++b) overflow |= !(sum_exp[b] < 1e30f);
        if (attempt > 0 || !__any_sync(0xffffffff, overflow)) break;
#pragma unroll
        for (int b = 0; b < kGroups; ++b) {
          const int row = b * 32 + lane.quad * 8;
          float x_rnorm[8], v[8];
          load_rows(x_rnorm, tail.rnorm, warp_row + row);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            v[i] = kLowest<float>;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const auto& terms = classes.terms[h];
              const float cosine =
                  cosine_of(acc[accumulator_of(b, i, h)], x_rnorm[i], classes.rnorm[h]);
              v[i] = larger(v[i], logit_of(scale, similarity(cosine, terms.kappa), terms.offset));
            }
          }
          const float most =
              gather_rows(v, lane.group, [](float a, float b) { return larger(a, b); });
          float& reference = references[row + lane.group];
          const float before = reference;
          __syncwarp();
          if (overflow && most > before) {
            row_sum_exp[b] *= exp_of(before - most);
            reference = most;
          }
        }
        __syncwarp();
      }
#pragma unroll
      for (int b = 0; b < kGroups; ++b) {
        row_sum_exp[b] += sum_exp[b];
        row_sum[b] += sum[b];
        row_rank[b] += rank[b];
      }
    }

    // Merge the warps that have the same rows, in order.
    auto& sums = *reinterpret_cast<typename Plan::Sums*>(smem);
    consumer_sync();
#pragma unroll
    for (int b = 0; b < kGroups; ++b) {
      const int row = b * 32 + lane.quad * 8 + lane.group;
      sums.sum_exp[lane.warp][row] = row_sum_exp[b];
      if constexpr (kAll) {
        sums.sum[lane.warp][row] = row_sum[b];
        sums.rank[lane.warp][row] = row_rank[b];
      }
    }
    consumer_sync();
    constexpr int kWarps = Shape::kSplitRows ? kConsumerWarps / 2 : kConsumerWarps;
    for (int i = threadIdx.x; i < Shape::kRows; i += kConsumers * kWarpgroup) {
      const int n = first_row + i, row = i % Shape::kProductRows;
      const int first_warp = i / Shape::kProductRows * kWarps;
      if (n >= head.N) break;
      float max = kLowest<float>, sum_exp = 0, sum = 0;
      int rank = 0;
      for (int w = first_warp; w < first_warp + kWarps; ++w)
        max = larger(max, tail.reference[w][row]);
      for (int w = first_warp; w < first_warp + kWarps; ++w) {
        sum_exp += sums.sum_exp[w][row] * exp_of(tail.reference[w][row] - max);
        if constexpr (kAll) {
          sum += sums.sum[w][row];
          rank += sums.rank[w][row];
        }
      }
      const int64_t at = int64_t(walker) * head.N + n;
      p.max[at] = max;
      p.sum_exp[at] = sum_exp;
      p.rank[at] = rank;
      if (p.with_sum) p.sum[at] = sum;
    }
  }
#else
  no_such_instructions();
#endif
}

template <Math kMath, class Shape>
cudaError_t launch(const ForwardParams<float>& p, const CudaPlan& plan, cudaStream_t stream) {
  const auto& hopper = plan.hopper;
  StatisticsParams params{
      p, {}, {}, int(hopper.class_tiles), int(hopper.row_blocks), int(hopper.walkers)};
  const CudaHead& head = p.head;
  cudaError_t error = make_tensor_map(&params.weight, head.weight.data, DType::kFloat32, head.C,
                                      head.D, head.weight.row_stride, Shape::kClasses, 32);
  if (error == cudaSuccess)
    error = make_tensor_map(&params.x, p.arranged.by_rows, plan.problem.x, hopper.rows,
                            hopper.columns, hopper.columns, Shape::kRows, kDepth);
  if (error != cudaSuccess) return error;
  const auto run = [&](auto kernel) {
    return launch_kernel(kernel, dim3(unsigned(hopper.row_blocks * hopper.walkers)), kThreads,
                         StatisticsPlan<Shape>::kBytes, stream, params);
  };
  return p.out.lse || p.with_sum ? run(statistics<kMath, Shape, true>)
                                 : run(statistics<kMath, Shape, false>);
}

}  // namespace

cudaError_t row_statistics(const ForwardParams<float>& p, const CudaPlan& plan,
                           cudaStream_t stream) {
  return with_cosine_shape(plan, [&](auto math, auto shape) {
    return launch<decltype(math)::value, decltype(shape)>(p, plan, stream);
  });
}

}  // namespace tvmf::sm90
