// The two products with a chunk's gradient: that with the features gives dw, that with the weights
// gives dx.
#include "cuda/rows/gradient_row.cuh"
#include "cuda/sm90/persistent.cuh"

namespace tvmf::sm90 {
namespace {

template <class Shape>
constexpr int kProductBytes = Shape::kStagesBytes + int(sizeof(typename Shape::Ring));

// A tile of dw has 128 classes x 256 features: the gradient of all rows times the features, less
// the projection. The cosines were made of the rounded weights, so the projection uses these too.
template <Math kMath, class W>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradient(const __grid_constant__ WeightGradientParams p) {
#ifdef TVMF_HOPPER
  using Shape = ProductShape<false>;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& ring = *reinterpret_cast<typename Shape::Ring*>(smem + Shape::kStagesBytes);
  const CudaHead& head = p.head;
  const int tiles = p.tiles.rows * p.tiles.cols;
  const WgmmaLane lane = WgmmaLane::of();
  ring.init();

  const auto produce = [&] {
    typename Shape::State state;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
      for (int step = 0; step < p.tiles.steps; ++step)
        Shape::copy(smem, ring, state, p.maps.a, p.maps.b, tile / p.tiles.cols * Shape::kRows,
                    tile % p.tiles.cols * Shape::kCols, step * kDepth);
  };
  const auto consume = [&] {
    typename Shape::State state;
    float acc[Shape::kAccumulators];
    const bool per_class_kappa = p.out.kappa.data && head.kappa.stride != 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int col = tile % p.tiles.cols;
      const int column = tile / p.tiles.cols * Shape::kRows + lane.warpgroup * 64 + lane.line;

      // Add up the column sums: factors of the gradient, and the gradients of bias and kappa.
      float factor[2], projected[2];
      bool wanted[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // The last tile can reach into the next chunk, where tiles of cosines are small.
        const int64_t c = p.chunk.begin + column + h * 8;
        const bool inside = column + h * 8 < p.chunk.count;
        wanted[h] = inside && p.out.weight.data;
        const float rnorm = inside ? p.saved.weight_rnorm[c] : 0.0f;
        const auto sum_of = [&](int which) {
          float sum = 0;
          for (int s = 0; s < p.sums.slots; ++s)
            sum += p.sums.data[(s * 3 + which) * p.chunk.size + column + h * 8];
          return sum;
        };
        factor[h] = outer_factor(*p.inv_loss_scale, rnorm, /*unit_rows=*/true);
        projected[h] = inside ? projection(sum_of(0), rnorm) / unit_scale(rnorm) : 0.0f;
        if (col == 0 && lane.quad == 0 && inside) {
          const auto store = [&](const GradientRef& to, float sum) {
            store_at(to, c, p.add ? static_cast<const float*>(to.data)[c] + sum : sum);
          };
          if (p.out.bias.data) store(p.out.bias, sum_of(1));
          if (per_class_kappa) store(p.out.kappa, sum_of(2));
        }
      }
      // The loads of the projection's weights are in flight while the products are made.
      struct alignas(8) Rounded {
        uint32_t pair[2];
      };
      constexpr int kRuns = Shape::kCols / 16;
      const int first_feature = col * Shape::kCols + lane.quad * 4, features = int(head.D);
      Rounded w[2][kRuns];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint16_t* from = p.weight.data + int64_t(column + h * 8) * p.weight.stride;
#pragma unroll
        for (int k = 0; k < kRuns; ++k) {
          const bool there = wanted[h] && first_feature + k * 16 < features;
          w[h][k] = there ? load_as<Rounded>(from + first_feature + k * 16) : Rounded{};
        }
      }
      Shape::template multiply<kMath>(smem, ring, state, lane, p.tiles.steps, acc);

#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!wanted[h]) continue;
        W* to = static_cast<W*>(p.out.weight.data) + (p.chunk.begin + column + h * 8) * head.D +
                first_feature;
        struct alignas(4 * sizeof(W)) Four {
          Pair<W> pair[2];
        };
#pragma unroll
        for (int k = 0; k < kRuns; ++k) {
          if (first_feature + k * 16 >= features) continue;
          float out[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            out[i] = factor[h] * acc[(k * 2 + i / 2) * 4 + h * 2 + i % 2] -
                     projected[h] * half_of<kMath>(w[h][k].pair[i / 2], i % 2);
          if constexpr (sizeof(W) == 4) {
            if (p.add) {
              const Four old = load_as<Four>(to + k * 16);
#pragma unroll
              for (int i = 0; i < 4; ++i)
                out[i] += i % 2 ? old.pair[i / 2].high : old.pair[i / 2].low;
            }
          }
          store_as(to + k * 16, Four{round_pair<W>(out[0], out[1]), round_pair<W>(out[2], out[3])});
        }
      }
    }
  };
  produce_and_consume(p.maps, lane, produce, consume);
#else
  no_such_instructions();
#endif
}

// A tile of a partial dx has 128 rows x 256 features: the chunk's gradient times its rounded
// weights, over one run of classes.
template <Math kMath>
__global__ void __launch_bounds__(kThreads, 1)
    feature_gradient(const __grid_constant__ FeatureGradientParams p) {
#ifdef TVMF_HOPPER
  using Shape = ProductShape<true>;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& ring = *reinterpret_cast<typename Shape::Ring*>(smem + Shape::kStagesBytes);
  const int tiles = p.tiles.rows * p.tiles.cols;
  const int tile = int(blockIdx.x) % tiles, split = int(blockIdx.x) / tiles;
  const int row = tile / p.tiles.cols * Shape::kRows;
  const int col = tile % p.tiles.cols * Shape::kCols;
  const int splits = int(p.dx.count), per_split = (p.tiles.steps + splits - 1) / splits;
  const int first_step = split * per_split, left = p.tiles.steps - first_step;
  const int steps = left < per_split ? left : per_split;
  const WgmmaLane lane = WgmmaLane::of();
  ring.init();

  const auto produce = [&] {
    typename Shape::State state;
    for (int step = 0; step < steps; ++step)
      Shape::copy(smem, ring, state, p.maps.a, p.maps.b, row, col, (first_step + step) * kDepth);
  };
  const auto consume = [&] {
    if (steps > 0 || !p.add) {
      typename Shape::State state;
      float acc[Shape::kAccumulators];
      if (steps > 0)
        Shape::template multiply<kMath>(smem, ring, state, lane, steps, acc);
      else
        for (float& each : acc) each = 0;
      float* dx = p.dx.data + int64_t(split) * p.N * p.D;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t n = row + lane.warpgroup * 64 + lane.line + h * 8;
        if (n >= p.N) continue;
        float* to = dx + n * p.D;
        const int first = col + lane.quad * 2, features = int(p.D);
        // Sixteen loads are in flight at once: the compiler would not move a load above a store
        // that may alias it.
        constexpr int kLoads = 16;
#pragma unroll
        for (int begin = 0; begin < Shape::kCols / 8; begin += kLoads) {
          Pair<float> old[kLoads];
#pragma unroll
          for (int j = 0; j < kLoads; ++j) {
            const int d = first + (begin + j) * 8;
            old[j] = p.add && d < features ? load_as<Pair<float>>(to + d) : Pair<float>{};
          }
#pragma unroll
          for (int j = 0; j < kLoads; ++j) {
            const int d = first + (begin + j) * 8, at = (begin + j) * 4 + h * 2;
            if (d < features)
              store_as(to + d, Pair<float>{old[j].low + acc[at], old[j].high + acc[at + 1]});
          }
        }
      }
    }
  };
  produce_and_consume(p.maps, lane, produce, consume);
#else
  no_such_instructions();
#endif
}

// Calls f with the kind of 16-bit product.
template <class F>
cudaError_t with_kind(const Plan& plan, const F& f) {
  return plan.math == Math::kBf16 ? f(MathConstant<Math::kBf16>{}) : f(MathConstant<Math::kF16>{});
}

}  // namespace

cudaError_t launch_weight_gradient(const WeightGradientParams& p, const Plan& plan,
                                   cudaStream_t stream) {
  const int64_t blocks = std::min(int64_t(p.tiles.rows) * p.tiles.cols, plan.blocks);
  return with_kind(plan, [&](auto math) {
    constexpr Math kMath = decltype(math)::value;
    using X = typename MathTraits<kMath>::X;
    return launch_kernel(
        plan.adds_gradients() || !plan.narrow_weight ? weight_gradient<kMath, float>
                                                     : weight_gradient<kMath, X>,
        dim3(unsigned(blocks)), kThreads, kProductBytes<ProductShape<false>>, stream, p);
  });
}

cudaError_t launch_feature_gradient(const FeatureGradientParams& p, const Plan& plan,
                                    cudaStream_t stream) {
  const int64_t blocks = int64_t(p.tiles.rows) * p.tiles.cols * p.dx.count;
  return with_kind(plan, [&](auto math) {
    return launch_kernel(feature_gradient<decltype(math)::value>, dim3(unsigned(blocks)), kThreads,
                         kProductBytes<ProductShape<true>>, stream, p);
  });
}

}  // namespace tvmf::sm90
