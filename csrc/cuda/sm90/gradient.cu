// The gradient tiles of a chunk of classes: t_nc = dL/dcosine.
#include "cuda/rows/gradient_row.cuh"
#include "cuda/sm90/persistent.cuh"

namespace tvmf::sm90 {
namespace {

__host__ __device__ constexpr int target_at(int row) { return row + row / 8; }

template <class Shape>
struct GradientLayout {
  // The terms of each row of the block, in the order in which they are read.
  struct Tail {
    typename Shape::Ring ring;
    float half_rnorm[Shape::kRows], scaled_rnorm[Shape::kRows], start[Shape::kRows];
    float others[Shape::kRows];  // scale dL/dothers / sum_exp
    float sum[Shape::kRows];     // scale dL/dsum
    int label[Shape::kRows];
    // One is left out after each 8 rows, so that lanes of different quads read different banks.
    TargetGradient<float> target[target_at(Shape::kRows)];
  };
  static constexpr int kBytes = Shape::kStagesBytes + int(sizeof(Tail));
  static_assert(kBytes <= 232448);
};

// Stores the 16-bit weights of a lane's two classes as unit rows.
template <Math kMath, class Shape>
struct StoreWeights {
  uint16_t* to;    // the first class's row
  int64_t stride;  // of `to`
  int first;       // the lane's first column of 32
  bool inside[2];  // whether the classes exist
  float unit[2];
  bool wanted;

  __device__ __forceinline__ uint32_t unit_pair(uint32_t pair, int h) const {
    if constexpr (kMath == Math::kBf16)
      return scale_bf16(pair, to_bf16(unit[h]));
    else if constexpr (Shape::kNarrow)
      return pack_f16(half_of<kMath>(pair, 0) * unit[h], half_of<kMath>(pair, 1) * unit[h]);
    else
      return pair;
  }
  __device__ __forceinline__ void operator()(int step, int half, const uint32_t* pairs) const {
    const int64_t d = step * kDepth + half * 32 + first;
    if (d >= stride) return;
    struct alignas(16) Four {
      uint32_t v[4];
    };
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (inside[h])
        store_as(to + h * 8 * stride + d,
                 Four{unit_pair(pairs[h], h), unit_pair(pairs[2 + h], h),
                      unit_pair(pairs[4 + h], h), unit_pair(pairs[6 + h], h)});
  }
};

// A persistent block makes the cosines of its tiles again, and from them the gradient tiles; it
// also stores the rounded weights. An element takes few multiplications because its class and its
// row take the rest: d has the unit 1 / sqrt((1 + 2 kappa) q), so that its inverse's square holds
// the slope of phi and the class's norm, and g stands for g times the scale.
template <Math kMath, class Shape, Terms kTerms>
__global__ void __launch_bounds__(kThreads, 1) gradient(const __grid_constant__ GradientParams p) {
#ifdef TVMF_HOPPER
  using Smem = GradientLayout<Shape>;
  constexpr int kGroups = Shape::kGroupRows / 32;
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
    const auto row = inside ? load_as<GradientRow<float>>(p.rows.rows + n) : GradientRow<float>{};
    tail.half_rnorm[i] = inside ? half_rnorm_of(row.rnorm) : 0.0f;
    tail.scaled_rnorm[i] = row.scaled_rnorm;
    // A row beyond the last gets so high a maximum that its exponentials are finite: its gradient
    // is an exponential times 0, which must not be NaN.
    tail.start[i] = start_of(scale, inside ? row.max : -kLowest<float>, tail.half_rnorm[i]);
    tail.others[i] = scale * row.others;
    tail.sum[i] = scale * row.sum;
    tail.label[i] = inside ? int(row.label) : int(kIgnored);
    if (inside) tail.target[target_at(i)] = load_as<TargetGradient<float>>(p.rows.targets + n);
  }
  tail.ring.init();

  const auto produce = [&] { block.copy(smem, tail.ring, p.maps, int(p.chunk.begin)); };
  const auto consume = [&] {
    const int warp_row = warp_row_of<Shape>(lane);
    const int slot =
        Shape::kSplitRows ? block.row_block * kConsumers + lane.warpgroup : block.row_block;
    typename Shape::State state;
    float acc[Shape::kAccumulators];
    float total_scale = 0, total_kappa = 0;

    for (int tile = block.first_tile; tile < block.tiles; tile += block.stride) {
      const int first_column = warp_class_of<Shape>(tile, lane);  // counted in the chunk
      const int column = first_column + lane.group;
      const int first_class = int(p.chunk.begin) + first_column;
      ClassForm classes[2];
      float offset[2], bias[2], omega[2], inner[2], unit[2];
      float col_dot[2] = {}, col_g[2] = {}, col_kappa[2] = {};
      bool inside[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t c = p.chunk.begin + column + h * 8;
        inside[h] = c < head.C;
        const auto terms = ClassValues<float>::of_gradient(head, c, scale);
        const float rnorm = inside[h] ? p.saved.weight_rnorm[c] : 0.0f;
        const float kappa = bounded_kappa(terms.kappa);
        inner[h] = unit_rnorm(rnorm), unit[h] = unit_scale(rnorm);
        classes[h] = ClassForm::of(kappa, cosine_rnorm<kMath, Shape>(rnorm),
                                   fast_rsqrt((1 + 2 * kappa) * inner[h]), scale, inside[h]);
        offset[h] = kLog2E * terms.offset, bias[h] = offset[h] - kLog2E * terms.bias;
        omega[h] = terms.omega;
      }
      // The blocks that share a class tile take turns in writing its rounded weights.
      const bool keep = tile % p.tiles.row_blocks == block.row_block && warp_row == 0;
      const StoreWeights<kMath, Shape> use{p.weight.data + column * p.weight.stride,
                                           p.weight.stride,
                                           lane.quad * 8,
                                           {inside[0], inside[1]},
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

#pragma unroll
      for (int b = 0; b < kGroups; ++b) {
        const int row = warp_row + b * 32 + lane.quad * 8;  // of the block's rows
        float value[2];
        uint32_t pairs[2][4];
        const auto rows = [&](auto with_target) {
          constexpr int kLoad = 4;
          float half_rnorm[kLoad], scaled_rnorm[kLoad], start[kLoad], others[kLoad];
          [[maybe_unused]] float sum[kLoad];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int k = i % kLoad;
            if (k == 0) {
              load_rows(half_rnorm, tail.half_rnorm, row + i);
              load_rows(scaled_rnorm, tail.scaled_rnorm, row + i);
              load_rows(start, tail.start, row + i);
              load_rows(others, tail.others, row + i);
              if constexpr (kAll) load_rows(sum, tail.sum, row + i);
            }
            const auto pair = PairForm::of<true>(
                classes, half_rnorm[k], acc[accumulator_of(b, i, 0)], acc[accumulator_of(b, i, 1)]);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float quotient = pair.v[h] * pair.inv_d[h];
              const float above = fma(quotient, classes[h].slope, start[k]);
              float g = others[k] * fast_exp2(kOffset ? above + offset[h] : above);
              if constexpr (kAll) g = fma(sum[k], omega[h], g);
              float t = g * (pair.inv_d[h] * pair.inv_d[h]);  // times the class's norm
              bool is_target = false;
              if constexpr (decltype(with_target)::value)
                is_target = tail.label[row + i] == first_class + lane.group + h * 8;
              if (!is_target) {
                total_scale = fma(g, above, total_scale);
                if constexpr (kAll) {
                  col_g[h] += g;
                  col_kappa[h] =
                      fma(g * pair.inv_d[h], fma(pair.v[h], quotient, -quotient), col_kappa[h]);
                }
              } else {
                const auto target =
                    load_as<TargetGradient<float>>(tail.target + target_at(row) + i);
                t = target.by_cosine * inner[h];
              }
              col_dot[h] = fma(t, pair.scaled[h], col_dot[h]);
              const float scaled = t * scaled_rnorm[k];
              if (i % 2 == 0)
                value[h] = scaled;
              else
                pairs[h][i / 2] = pack<kMath>(value[h], scaled);
            }
          }
        };
        if (targets >> b & 1) {
          rows(std::true_type{});
          __syncwarp();  // lanes have read the terms of their targets one after another
        } else {
          rows(std::false_type{});
        }
        struct alignas(16) Four {
          uint32_t v[4];
        };
        if (b * 32 < rows_left)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (inside[h])
              store_as(to[h] + b * 32, Four{pairs[h][0], pairs[h][1], pairs[h][2], pairs[h][3]});
      }

      // Finish the sums over the rows: of t c, and of g and g dphi/dkappa times the scale.
      float sums[3][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // The products were made of the weights themselves, but t has the norm of unit rows.
        sums[0][h] = 2 * col_dot[h] * (kUnitRows<kMath, Shape> ? 1.0f : unit[h]);
        if constexpr (kAll) {
          total_scale = fma(col_g[h], bias[h], total_scale);
          sums[1][h] = col_g[h];
          sums[2][h] = col_kappa[h] * (4 * classes[h].unit * classes[h].unit);
        }
      }
      if constexpr (kAll) {
#pragma unroll 1
        for (int b = 0; b < kGroups; ++b) {
          const int row = warp_row + b * 32 + lane.quad * 8;
          if (!(targets >> b & 1)) continue;
#pragma unroll 1
          for (int i = 0; i < 8; ++i) {
            const int h8 = tail.label[row + i] - first_class - lane.group;
            if (h8 != 0 && h8 != 8) continue;
            const auto target = load_as<TargetGradient<float>>(tail.target + target_at(row) + i);
            const float g = scale * target.by_logit;
#pragma unroll
            for (int h = 0; h < 2; ++h)
              if (h8 == h * 8) sums[1][h] += g, sums[2][h] += g * target.phi_by_kappa;
          }
        }
        total_kappa += sums[2][0] + sums[2][1];
      }
      constexpr int kSums = kAll ? 3 : 1;
#pragma unroll
      for (int which = 0; which < kSums; ++which)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float sum = quad_sum(sums[which][h]);
          if (lane.quad == 0 && inside[h])
            p.sums.columns[(slot * 3 + which) * p.chunk.size + column + h * 8] = sum;
        }
    }

    const double warp_scale = warp_sum(double(total_scale)) / (double(kLog2E) * double(scale)),
                 warp_kappa = warp_sum(double(total_kappa));
    if (lane.lane == 0) {
      double* totals = p.sums.totals + 2 * (int64_t(blockIdx.x) * kConsumerWarps + lane.warp);
      totals[0] = p.chunk.begin == 0 ? warp_scale : totals[0] + warp_scale;
      totals[1] = p.chunk.begin == 0 ? warp_kappa : totals[1] + warp_kappa;
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
