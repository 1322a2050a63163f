// The gradient tiles of a chunk of classes: t_nc = dL/dcosine.
#include "cuda/sm90/gradient_tile.cuh"
#include "cuda/sm90/persistent.cuh"
#include "cuda/sm90/store_weights.cuh"

namespace tvmf::sm90 {
namespace {

template <class Shape>
struct GradientLayout {
  // The terms of each row of the block.
  struct Tail {
    typename Shape::Ring ring;
    float half_rnorm[Shape::kRows], scaled_rnorm[Shape::kRows], start[Shape::kRows];
    float others[Shape::kRows], sum[Shape::kRows];
    int label[Shape::kRows];
    TargetGradient<float> target[target_at(Shape::kRows)];
  };
  static constexpr int kBytes = Shape::kStagesBytes + int(sizeof(Tail));
  static_assert(kBytes <= 232448);
};

// A persistent block makes the cosines of its tiles again, and from them the gradient tiles; it
// also stores the rounded weights.
template <Math kMath, class Shape, Terms kTerms>
__global__ void __launch_bounds__(kThreads, 1) gradient(const __grid_constant__ GradientParams p) {
#ifdef TVMF_HOPPER
  using Smem = GradientLayout<Shape>;
  constexpr int kGroups = Shape::kGroupRows / 32;
  constexpr bool kAll = kTerms == Terms::kAll;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& tail = *reinterpret_cast<typename Smem::Tail*>(smem + Shape::kStagesBytes);
  const CudaHead& head = p.head;
  const auto block = CosineBlock<Shape>::of(p.tiles, head.D);
  const int first_row = block.first_row;
  const WgmmaLane lane = WgmmaLane::of();
  const float scale = Scale<float>::of(head).value;

  const RowTerms terms{tail.half_rnorm, tail.scaled_rnorm, tail.start, tail.others,
                       tail.sum,        tail.label,        tail.target};

  // Fetch the rows' terms.
  for (int i = threadIdx.x; i < Shape::kRows; i += kThreads) {
    const int n = first_row + i;
    const bool inside = n < head.N;
    const auto row = inside ? load_as<GradientRow<float>>(p.rows.rows + n) : GradientRow<float>{};
    terms.set(i, inside, row, scale);
    if (inside) terms.target[target_at(i)] = load_as<TargetGradient<float>>(p.rows.targets + n);
  }
  tail.ring.init();

  const auto produce = [&] { block.copy(smem, tail.ring, p.maps, int(p.chunk.begin)); };
  const auto consume = [&] {
    const int warp_row = warp_row_of<Shape>(lane);
    const int slot =
        Shape::kSplitRows ? block.row_block * kConsumers + lane.warpgroup : block.row_block;
    typename Shape::State state;
    float acc[Shape::kAccumulators];
    TotalSums totals;

    for (int tile = block.first_tile; tile < block.tiles; tile += block.stride) {
      const int first_column = warp_class_of<Shape>(tile, lane);  // counted in the chunk
      const int column = first_column + lane.group;
      const int first_class = int(p.chunk.begin) + first_column;
      float unit[2];
      const auto classes =
          PairOfClasses::of(head, p.chunk.begin + column, scale, [&](int h, int64_t c) {
            const float rnorm = c < head.C ? p.saved.weight_rnorm[c] : 0.0f;
            unit[h] = unit_scale(rnorm);
            return Pair<float>{cosine_rnorm<kMath, Shape>(rnorm), unit_rnorm(rnorm)};
          });
      // The blocks that share a class tile take turns in writing its rounded weights.
      const bool keep = tile % p.tiles.row_blocks == block.row_block && warp_row == 0;
      const StoreUnitRows<kMath, Shape> use{{p.weight.data + column * p.weight.stride,
                                             p.weight.stride,
                                             lane.quad * 8,
                                             {classes.inside[0], classes.inside[1]},
                                             keep},
                                            {unit[0], unit[1]},
                                            keep};
      float squares[2] = {};
      Shape::template multiply<kMath>(smem, tail.ring, state, lane, block.steps, acc, unit, squares,
                                      use);
      const unsigned targets =
          groups_with_target<kGroups>(tail.label + warp_row, first_class, lane.lane);

      uint16_t* to[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        to[h] = p.gradient.data + (column + h * 8) * p.gradient.stride + first_row + warp_row +
                lane.quad * 8;
      const int rows_left = int(p.gradient.stride) - first_row - warp_row - lane.quad * 8;

      PairSums sums;
#pragma unroll
      for (int b = 0; b < kGroups; ++b) {
        uint32_t pairs[2][4];
        gradient_rows<kMath, kTerms>(
            terms, warp_row + b * 32 + lane.quad * 8, first_class + lane.group, targets >> b & 1,
            classes, [&](int i, int h) { return acc[accumulator_of(b, i, h)]; }, sums, totals,
            pairs);
        if (b * 32 < rows_left)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (classes.inside[h]) store_gradients(to[h] + b * 32, pairs[h]);
      }

      // Finish the sums over the rows. The products were made of the weights themselves, but t has
      // the norm of unit rows.
      float finished[3][2], dot_factor[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) dot_factor[h] = kUnitRows<kMath, Shape> ? 1.0f : unit[h];
      finish_sums<kTerms>(classes, sums, dot_factor, totals, finished);
      if constexpr (kAll) {
#pragma unroll 1
        for (int b = 0; b < kGroups; ++b)
          if (targets >> b & 1)
            add_targets(terms, warp_row + b * 32 + lane.quad * 8, first_class + lane.group, scale,
                        finished);
        totals.kappa += finished[2][0] + finished[2][1];
      }
      constexpr int kSums = kAll ? 3 : 1;
#pragma unroll
      for (int which = 0; which < kSums; ++which)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float sum = quad_sum(finished[which][h]);
          if (lane.quad == 0 && classes.inside[h])
            p.sums.columns[(slot * 3 + which) * p.chunk.size + column + h * 8] = sum;
        }
    }

    const double warp_scale = warp_sum(double(totals.scale)) / (double(kLog2E) * double(scale)),
                 warp_kappa = warp_sum(double(totals.kappa));
    if (lane.lane == 0) {
      double* to = p.sums.totals + 2 * (int64_t(blockIdx.x) * kConsumerWarps + lane.warp);
      to[0] = p.chunk.begin == 0 ? warp_scale : to[0] + warp_scale;
      to[1] = p.chunk.begin == 0 ? warp_kappa : to[1] + warp_kappa;
    }
  };
  produce_and_consume(p.maps, lane, produce, consume);
#else
  no_such_instructions();
#endif
}

}  // namespace

cudaError_t launch_gradient(const GradientParams& p, const Plan& plan, cudaStream_t stream) {
  const dim3 grid(unsigned(p.tiles.row_blocks * p.tiles.blocks));
  return with_cosine_shape(plan, [&](auto math, auto shape) {
    return with_terms<decltype(shape)>(p.terms, [&](auto kind) {
      constexpr Math kMath = decltype(math)::value;
      using Shape = decltype(shape);
      return launch_kernel(gradient<kMath, Shape, decltype(kind)::value>, grid, kThreads,
                           GradientLayout<Shape>::kBytes, stream, p);
    });
  });
}

}  // namespace tvmf::sm90
