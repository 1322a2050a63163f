// Tiles of cosines become statistics of the rows. Exponentials are relative to a reference of each
// row, which starts a little under the logit of the target and is raised where they overflow. Where
// all others are more than 87 below it, their exponentials are 0, and the loss is below 1e-37.
#include "cuda/rows/merge.cuh"
#include "cuda/sm90/persistent.cuh"
#include "cuda/sm90/store_weights.cuh"

namespace tvmf::sm90 {
namespace {

template <class Shape>
struct StatisticsLayout {
  struct Tail {
    typename Shape::Ring ring;
    float half_rnorm[Shape::kRows], target_score[Shape::kRows];
    int label[Shape::kRows];
    // Of each warp's rows: the reference of its exponentials, and the same as start_of makes it.
    float reference[kConsumerWarps][Shape::kGroupRows];
    float start[kConsumerWarps][Shape::kGroupRows];
  };
  // The warps hand over their statistics where the stages were.
  struct Sums {
    float sum_exp[kConsumerWarps][Shape::kGroupRows], sum[kConsumerWarps][Shape::kGroupRows];
    int rank[kConsumerWarps][Shape::kGroupRows];
    float largest_logit[kConsumerWarps];
    double losses[2 * kConsumerWarps];  // of merge_rows
    int last;                           // whether the block is the last
  };
  static_assert(sizeof(Sums) <= Shape::kStagesBytes);
  static constexpr int kBytes = Shape::kStagesBytes + int(sizeof(Tail));
  static_assert(kBytes <= 232448);
};

// Adds up the squares of a lane's two lines of weights where CosineShape::multiply does not,
// because it multiplies them where they lie. The products that are under way hide this.
template <Math kMath, class Shape>
struct AddSquares {
  static constexpr bool wanted = Shape::kNarrow;
  float (&sums)[2];

  __device__ __forceinline__ void operator()(int, int, const uint32_t* pairs) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float element = half_of<kMath>(pairs[i / 2], i % 2);
      float& sum = sums[i / 2 % 2];
      sum = fma(element, element, sum);
    }
  }
};

// Keeps a lane's products, [64 classes, rows] as they lie in its registers, for the backward pass.
template <class Shape>
__device__ __forceinline__ void keep_products(const KeptTensors& kept, int first_class, int C,
                                              int first_row,
                                              const float (&acc)[Shape::kAccumulators]) {
  struct alignas(16) Four {
    float v[4];
  };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (first_class + h * 8 >= C) continue;
    float* to = kept.product + (first_class + h * 8) * kept.stride;
#pragma unroll
    for (int b = 0; b < Shape::kGroupRows / 32; ++b) {
      if (first_row + b * 32 >= kept.stride) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = half * 4;
        store_as(to + kept_half(first_row, half) + b * 32,
                 Four{acc[accumulator_of(b, i, h)], acc[accumulator_of(b, i + 1, h)],
                      acc[accumulator_of(b, i + 2, h)], acc[accumulator_of(b, i + 3, h)]});
      }
    }
  }
}

// A persistent block walks tiles of classes with its rows, whose statistics a lane keeps in
// registers. In small problems the last block merges the statistics of all, which saves a launch.
template <Math kMath, class Shape, Terms kTerms>
__global__ void __launch_bounds__(kThreads, 1)
    statistics(const __grid_constant__ StatisticsParams p) {
#ifdef TVMF_HOPPER
  using Smem = StatisticsLayout<Shape>;
  constexpr int kGroups = Shape::kGroupRows / 32;
  // Whether the norms of the weights are known before the products.
  constexpr bool kKnownNorms = kUnitRows<kMath, Shape>;
  constexpr bool kAll = kTerms == Terms::kAll, kOffset = kTerms != Terms::kPlain;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& tail = *reinterpret_cast<typename Smem::Tail*>(smem + Shape::kStagesBytes);
  const CudaHead& head = p.head;
  const auto block = CosineBlock<Shape>::of(p.tiles, head.D);
  const int first_row = block.first_row;
  const WgmmaLane lane = WgmmaLane::of();
  const float scale = Scale<float>::of(head).value;

  // Fetch the rows' terms.
  for (int i = threadIdx.x; i < Shape::kRows; i += kThreads) {
    const int n = first_row + i;
    const bool inside = n < head.N;
    const int64_t label = inside ? p.targets.label[n] : kIgnored;
    const float half_rnorm = inside ? half_rnorm_of(p.saved.x_rnorm[n]) : 0.0f;
    tail.half_rnorm[i] = half_rnorm;
    tail.target_score[i] = inside ? p.targets.score[n] : 0.0f;
    tail.label[i] = int(label);
    // Rows without a target have no reference yet. Rows beyond the last get one so high that their
    // exponentials are 0.
    float reference = inside ? kLowest<float> : -kLowest<float>;
    if (label >= 0 || label == kElsewhere)
      reference = larger(p.saved.target_logit[n] - 0.25f, reference);
    const int first_warp = RowWarps<Shape>::first(i);
    for (int w = 0; w < RowWarps<Shape>::kCount; ++w) {
      tail.reference[first_warp + w][i % Shape::kGroupRows] = reference;
      tail.start[first_warp + w][i % Shape::kGroupRows] = start_of(scale, reference, half_rnorm);
    }
  }
  tail.ring.init();

  const auto produce = [&] { block.copy(smem, tail.ring, p.maps, 0); };
  const auto consume = [&] {
    const int warp_row = warp_row_of<Shape>(lane);
    float *references = tail.reference[lane.warp], *starts = tail.start[lane.warp];
    typename Shape::State state;
    float acc[Shape::kAccumulators];
    float row_sum_exp[kGroups] = {}, row_sum[kGroups] = {};
    int row_rank[kGroups] = {};
    float largest_logit = kLowest<float>;  // of the lane, in float16

    for (int tile = block.first_tile; tile < block.tiles; tile += block.stride) {
      const int first_class = warp_class_of<Shape>(tile, lane);
      const auto class_of = [&](int h) { return first_class + lane.group + h * 8; };
      ClassValues<float> terms[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) terms[h] = ClassValues<float>::of(head, class_of(h), scale);
      float squares[2] = {}, unit[2] = {}, rnorm[2];
      if constexpr (kKnownNorms) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          rnorm[h] = class_of(h) < head.C ? p.saved.weight_rnorm[class_of(h)] : 0.0f;
          unit[h] = unit_scale(rnorm[h]), rnorm[h] = unit_rnorm(rnorm[h]);
        }
      }
      const auto multiply = [&](const auto& use) {
        Shape::template multiply<kMath>(smem, tail.ring, state, lane, block.steps, acc, unit,
                                        squares, use);
      };
      if constexpr (Shape::kSplitRows && !Shape::kNarrow) {
        // The blocks that share a class tile take turns in keeping its rounded weights.
        const RoundedWeights& to = p.kept.weight;
        multiply(
            StoreWeights{to.data + class_of(0) * to.stride,
                         to.stride,
                         lane.quad * 8,
                         {class_of(0) < head.C, class_of(1) < head.C},
                         to.data && warp_row == 0 && tile % p.tiles.row_blocks == block.row_block});
      } else {
        multiply(AddSquares<kMath, Shape>{squares});
      }
      if constexpr (Shape::kSplitRows)
        if (p.kept.product)
          keep_products<Shape>(p.kept, class_of(0), int(head.C),
                               first_row + warp_row + lane.quad * 8, acc);

      // Finish the norms of the weights. The blocks of the first rows save them for the backward
      // pass.
      if constexpr (!kKnownNorms) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          rnorm[h] = rnorm_of(quad_sum(squares[h]));
          if (first_row + warp_row == 0 && lane.quad == 0 && class_of(h) < head.C)
            p.saved.weight_rnorm[class_of(h)] = rnorm[h];
        }
      }
      ClassForm classes[2];
      float offset[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        classes[h] =
            ClassForm::of(bounded_kappa(terms[h].kappa), rnorm[h], 1, scale, class_of(h) < head.C);
        offset[h] = kLog2E * terms[h].offset;
      }
      const auto logit_of = [&](float quotient, int h) {
        const float logit = fma(quotient, classes[h].slope, kLog2E * scale);
        return kLn2 * (kOffset ? logit + offset[h] : logit);
      };
      const unsigned targets =
          groups_with_target<kGroups>(tail.label + warp_row, first_class, lane.lane);

      float sum_exp[kGroups], sum[kGroups] = {};
      int rank[kGroups] = {};
      for (int attempt = 0;; ++attempt) {
        float least[2] = {1e30f, 1e30f};  // quotient of each class, in float16
#pragma unroll
        for (int b = 0; b < kGroups; ++b) {
          const int row = b * 32 + lane.quad * 8;  // of the warp's rows
          float half_rnorm[8], start[8], target_score[8], v[8], total[8];
          load_rows(half_rnorm, tail.half_rnorm, warp_row + row);
          load_rows(start, starts, row);
          if constexpr (kAll) load_rows(target_score, tail.target_score, warp_row + row);
          int count[2] = {};
          const auto rows = [&](auto with_target) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const auto pair =
                  PairForm::of<!kAll>(classes, half_rnorm[i], acc[accumulator_of(b, i, 0)],
                                      acc[accumulator_of(b, i, 1)]);
              v[i] = total[i] = 0;
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                bool is_target = false;
                if constexpr (decltype(with_target)::value)
                  is_target = tail.label[warp_row + row + i] == class_of(h);
                const float quotient = pair.v[h] * pair.inv_d[h];
                float power = fma(quotient, classes[h].slope, start[i]);
                if constexpr (kOffset) power += offset[h];
                const float e = fast_exp2(power);
                v[i] += is_target ? 0.0f : e;
                if constexpr (kMath == Math::kF16)
                  if (!is_target) least[h] = fminf(least[h], quotient);
                if constexpr (kAll) {
                  if (class_of(h) < head.C && !is_target) {
                    const float score = phi_of(quotient, classes[h].kappa) + terms[h].bias;
                    if (!(score <= target_score[i])) count[i / 4] += 1 << i % 4 * 8;
                    if (p.partial.with_sum)
                      total[i] = fma(terms[h].omega, logit_of(quotient, h), total[i]);
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
            if (p.partial.with_sum) sum[b] = sum_rows(total, lane.group);
            const int low = group_sum(count[0]), high = group_sum(count[1]);
            rank[b] = (lane.group < 4 ? low : high) >> lane.group % 4 * 8 & 255;
          }
        }
        if constexpr (kMath == Math::kF16) {
#pragma unroll
          for (int h = 0; h < 2; ++h) largest_logit = larger(largest_logit, logit_of(least[h], h));
        }

        // Where exponentials overflowed, the largest logit of the row becomes its reference. This
        // happens at most once for each tile.
        bool overflow = false;
#pragma unroll
        for (int b = 0; b < kGroups; ++b) overflow |= !(sum_exp[b] < 1e30f);
        if (attempt > 0 || !__any_sync(0xffffffff, overflow)) break;
#pragma unroll
        for (int b = 0; b < kGroups; ++b) {
          const int row = b * 32 + lane.quad * 8;
          float half_rnorm[8], v[8];
          load_rows(half_rnorm, tail.half_rnorm, warp_row + row);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const auto pair = PairForm::of<!kAll>(
                classes, half_rnorm[i], acc[accumulator_of(b, i, 0)], acc[accumulator_of(b, i, 1)]);
            v[i] = kLowest<float>;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float logit = logit_of(pair.v[h] * pair.inv_d[h], h);
              if (tail.label[warp_row + row + i] != class_of(h)) v[i] = larger(v[i], logit);
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
            starts[row + lane.group] =
                start_of(scale, most, tail.half_rnorm[warp_row + row + lane.group]);
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
    auto& sums = *reinterpret_cast<typename Smem::Sums*>(smem);
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
    if constexpr (kMath == Math::kF16) {
      for (int mask = 1; mask < kWarp; mask *= 2)
        largest_logit = larger(largest_logit, __shfl_xor_sync(0xffffffff, largest_logit, mask));
      if (lane.lane == 0) sums.largest_logit[lane.warp] = largest_logit;
    }
    consumer_sync();
    constexpr int kWarps = RowWarps<Shape>::kCount;
    for (int i = threadIdx.x; i < Shape::kRows; i += kConsumers * kWarpgroup) {
      const int n = first_row + i, row = i % Shape::kGroupRows;
      const int first_warp = RowWarps<Shape>::first(i);
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
      if constexpr (kMath == Math::kF16) {
        // The loss scale needs a tight bound on the row's logits. It becomes the reference: the
        // block's largest logit, which is known where the scale is positive, or the logarithm of
        // the row's sum where that is less.
        float bound = kLowest<float>;
        for (float each : sums.largest_logit) bound = larger(bound, each);
        const float lse = max + log(sum_exp);
        bound = larger(lse < bound || !(scale > 0) ? lse : bound, max - 80);
        if (sum_exp > 0) sum_exp *= exp_of(max - bound), max = bound;
      }
      const int64_t at = int64_t(block.first_tile) * head.N + n;
      p.partial.max[at] = max;
      p.partial.sum_exp[at] = sum_exp;
      p.partial.rank[at] = rank;
      if (p.partial.with_sum) p.partial.sum[at] = sum;
    }
    if constexpr (Shape::kSplitRows) {
      if (!p.merges_rows) return;
      consumer_sync();
      if (threadIdx.x == 0) sums.last = last_to_arrive(p.finished, gridDim.x);
      consumer_sync();
      if (!sums.last) return;
      double totals[2] = {};
      rows::merge_rows<float, Consumers>(p, 0, head.N, sums.losses, totals);
      if (!rows::reduces_loss(p)) return;
      block_sums<Consumers>(totals, sums.losses);
      if (threadIdx.x == 0) rows::store_loss<float>(p, totals);
    }
  };
  produce_and_consume(p.maps, lane, produce, consume);
#else
  no_such_instructions();
#endif
}

}  // namespace

cudaError_t launch_statistics(const StatisticsParams& p, const Plan& plan, Terms terms,
                              cudaStream_t stream) {
  const dim3 grid(unsigned(p.tiles.row_blocks * p.tiles.blocks));
  return with_cosine_shape(plan, [&](auto math, auto shape) {
    return with_terms<decltype(shape)>(terms, [&](auto kind) {
      constexpr Math kMath = decltype(math)::value;
      using Shape = decltype(shape);
      return launch_kernel(statistics<kMath, Shape, decltype(kind)::value>, grid, kThreads,
                           StatisticsLayout<Shape>::kBytes, stream, p);
    });
  });
}

}  // namespace tvmf::sm90
