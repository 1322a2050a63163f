// The gradient tiles of a chunk of classes: t_nc = dL/dcosine.
#include "cuda/rows/gradient_row.cuh"
#include "cuda/sm90/persistent.cuh"

namespace tvmf::sm90 {
namespace {

template <class Shape>
struct GradientLayout {
  // The terms of each row of the block, in the order in which they are read.
  struct Tail {
    typename Shape::Ring ring;
    float rnorm[Shape::kRows], scaled_rnorm[Shape::kRows], max[Shape::kRows];
    float others[Shape::kRows];  // dL/dothers / sum_exp
    float sum[Shape::kRows];     // dL/dsum
    int label[Shape::kRows];
    TargetGradient<float> target[Shape::kRows];
  };
  struct Sums {
    float dot[kConsumerWarps][Shape::kGroupRows];
  };
  static_assert(sizeof(Sums) <= Shape::kStagesBytes);
  static constexpr int kBytes = Shape::kStagesBytes + int(sizeof(Tail));
  static_assert(kBytes <= 232448);
};

// A persistent block makes the cosines of its tiles again, and from them the gradient tiles; it
// also stores the rounded weights. kAll: with the gradients of kappa and bias, and that of `sum`.
template <Math kMath, class Shape, bool kAll>
__global__ void __launch_bounds__(kThreads, 1) gradient(const __grid_constant__ GradientParams p) {
#ifdef TVMF_HOPPER
  using Smem = GradientLayout<Shape>;
  constexpr int kGroups = Shape::kGroupRows / 32;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& tail = *reinterpret_cast<typename Smem::Tail*>(smem + Shape::kStagesBytes);
  const CudaHead& head = p.head;
  const auto block = CosineBlock<Shape>::of(p.tiles, head.D);
  const int first_row = block.first_row;
  const WgmmaLane lane = WgmmaLane::of();

  // Fetch the rows' terms.
  for (int i = threadIdx.x; i < Shape::kRows; i += kThreads) {
    const int n = first_row + i;
    const bool inside = n < head.N;
    const auto row = inside ? load_as<GradientRow<float>>(p.rows.rows + n) : GradientRow<float>{};
    tail.rnorm[i] = row.rnorm;
    tail.scaled_rnorm[i] = row.scaled_rnorm;
    // A row beyond the last gets so high a maximum that its exponentials are finite: its gradient
    // is an exponential times 0, which must not be NaN.
    tail.max[i] = inside ? row.max : -kLowest<float>;
    tail.others[i] = row.others;
    tail.sum[i] = row.sum;
    tail.label[i] = inside ? int(row.label) : int(kIgnored);
    if (inside) tail.target[i] = load_as<TargetGradient<float>>(p.rows.targets + n);
  }
  tail.ring.init();

  const auto produce = [&] { block.copy(smem, tail.ring, p.maps, int(p.chunk.begin)); };
  const auto consume = [&] {
    const float scale = Scale<float>::of(head).value;
    const int warp_row = warp_row_of<Shape>(lane);
    const int slot =
        Shape::kSplitRows ? block.row_block * kConsumers + lane.warpgroup : block.row_block;
    typename Shape::State state;
    float acc[Shape::kAccumulators];
    float row_dot[kGroups] = {};
    float total_scale = 0, total_kappa = 0;

    for (int tile = block.first_tile; tile < block.tiles; tile += block.stride) {
      const int first_column = warp_class_of<Shape>(tile, lane);  // counted in the chunk
      const int column = first_column + lane.group;
      const int first_class = int(p.chunk.begin) + first_column;
      ClassPair classes;
      float weight_factor[2], col_dot[2] = {}, col_bias[2] = {}, col_kappa[2] = {};
      bool inside[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t c = p.chunk.begin + column + h * 8;
        inside[h] = c < head.C;
        classes.terms[h] = ClassValues<float>::of_gradient(head, c, scale);
        classes.rnorm[h] = inside[h] ? p.saved.weight_rnorm[c] : 0.0f;
        weight_factor[h] = inner_rnorm(classes.rnorm[h], p.options.float16);
      }
      // The blocks that share a class tile take turns in writing its rounded weights.
      const bool keep = tile % p.tiles.row_blocks == block.row_block && warp_row == 0;
      const auto use = [&](int step, int half, const uint32_t* pairs) {
        const int64_t d = step * kDepth + half * 32 + lane.quad * 8;
        if (!keep || d >= p.weight.stride) return;
        struct alignas(16) Four {
          uint32_t v[4];
        };
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (inside[h])
            store_as(p.weight.data + (column + h * 8) * p.weight.stride + d,
                     Four{pairs[h], pairs[2 + h], pairs[4 + h], pairs[6 + h]});
      };
      float squares[2] = {};
      Shape::template multiply<kMath>(smem, tail.ring, state, lane, block.steps, acc, squares, use);
      const unsigned targets =
          groups_with_target<kGroups>(tail.label + warp_row, first_class, lane.lane);

#pragma unroll
      for (int b = 0; b < kGroups; ++b) {
        const int row = warp_row + b * 32 + lane.quad * 8;  // of the block's rows
        float dot[8], scaled[2];
        uint32_t pairs[2][4];
        const auto rows = [&](auto with_target) {
          // Registers are short where all gradients meet a target, so that terms are loaded by the
          // row.
          constexpr int kLoad = kAll && decltype(with_target)::value ? 1 : 8;
          float x_rnorm[kLoad], scaled_rnorm[kLoad], max[kLoad], others[kLoad];
          [[maybe_unused]] float sum[kLoad];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int k = i % kLoad;
            if (k == 0) {
              load_rows(x_rnorm, tail.rnorm, row + i);
              load_rows(scaled_rnorm, tail.scaled_rnorm, row + i);
              load_rows(max, tail.max, row + i);
              load_rows(others, tail.others, row + i);
              if constexpr (kAll) load_rows(sum, tail.sum, row + i);
            }
            dot[i] = 0;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const auto& terms = classes.terms[h];
              float cosine = cosine_of(acc[accumulator_of(b, i, h)], x_rnorm[k], classes.rnorm[h]);
              const auto s = similarity_with_gradient(cosine, terms.kappa);
              const float logit = logit_of(scale, s.phi, terms.offset);
              const float below = logit - max[k];
              float g = others[k] * exp_of(below);
              if constexpr (kAll)
                if (p.options.with_sum) g += sum[k] * terms.omega;
              float t = g * scale * s.dphi_dcosine;
              bool is_target = false;
              if constexpr (decltype(with_target)::value)
                is_target = tail.label[row + i] == first_class + lane.group + h * 8;
              float phi_by_kappa = s.dphi_dkappa;
              if (!is_target) {
                total_scale = fma(g, below - terms.bias, total_scale);
              } else {
                const auto target = load_as<TargetGradient<float>>(tail.target + row + i);
                cosine = target.cosine, t = target.by_cosine;
                g = target.by_logit, phi_by_kappa = target.phi_by_kappa;
              }
              if constexpr (kAll) {
                col_bias[h] += g;
                col_kappa[h] = fma(g, phi_by_kappa, col_kappa[h]);
              }
              dot[i] = fma(t, cosine, dot[i]);
              col_dot[h] = fma(t, cosine, col_dot[h]);
              const float value = t * scaled_rnorm[k] * weight_factor[h];
              if (i % 2 == 0)
                scaled[h] = value;
              else
                pairs[h][i / 2] = pack<kMath>(scaled[h], value);
            }
          }
        };
        if (targets >> b & 1)
          rows(std::true_type{});
        else
          rows(std::false_type{});
        row_dot[b] += sum_rows(dot, lane.group);
        const int64_t n = first_row + row;
        struct alignas(16) Four {
          uint32_t v[4];
        };
        if (n < p.gradient.stride)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (inside[h])
              store_as(p.gradient.data + (column + h * 8) * p.gradient.stride + n,
                       Four{pairs[h][0], pairs[h][1], pairs[h][2], pairs[h][3]});
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        total_kappa += col_kappa[h];
        const float sums[3] = {quad_sum(col_dot[h]), quad_sum(col_bias[h]), quad_sum(col_kappa[h])};
        if (lane.quad == 0 && inside[h])
#pragma unroll
          for (int which = 0; which < 3; ++which)
            p.sums.columns[(slot * 3 + which) * p.chunk.size + column + h * 8] = sums[which];
      }
    }

    const double warp_scale = warp_sum(double(total_scale)),
                 warp_kappa = warp_sum(double(total_kappa)) * double(scale);
    if (lane.lane == 0) {
      double* totals = p.sums.totals + 2 * (int64_t(blockIdx.x) * kConsumerWarps + lane.warp);
      totals[0] = p.chunk.begin == 0 ? warp_scale : totals[0] + warp_scale;
      totals[1] = p.chunk.begin == 0 ? warp_kappa : totals[1] + warp_kappa;
    }
    // Merge the warps that have the same rows, in order.
    auto& sums = *reinterpret_cast<typename Smem::Sums*>(smem);
    consumer_sync();
#pragma unroll
    for (int b = 0; b < kGroups; ++b)
      sums.dot[lane.warp][b * 32 + lane.quad * 8 + lane.group] = row_dot[b];
    consumer_sync();
    constexpr int kWarps = RowWarps<Shape>::kCount;
    for (int i = threadIdx.x; i < Shape::kRows; i += kConsumers * kWarpgroup) {
      const int n = first_row + i, first_warp = RowWarps<Shape>::first(i);
      if (n >= head.N) break;
      float dot = 0;
      for (int w = first_warp; w < first_warp + kWarps; ++w)
        dot += sums.dot[w][i % Shape::kGroupRows];
      float& sum = p.sums.row_dot[int64_t(block.first_tile) * head.N + n];
      sum = p.chunk.begin == 0 ? dot : sum + dot;
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
    constexpr Math kMath = decltype(math)::value;
    using Shape = decltype(shape);
    return launch_kernel(
        p.options.all ? gradient<kMath, Shape, true> : gradient<kMath, Shape, false>, grid,
        kThreads, GradientLayout<Shape>::kBytes, stream, p);
  });
}

}  // namespace tvmf::sm90
