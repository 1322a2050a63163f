// The two products with a chunk's gradient, in one launch: that with the features gives dw, that
// with the weights gives dx.
#include "cuda/rows/gradient_row.cuh"
#include "cuda/sm90/persistent.cuh"

namespace tvmf::sm90 {
namespace {

using WeightShape = ProductShape<false>;
using FeatureShape = ProductShape<true>;
constexpr int kProductBytes = WeightShape::kStagesBytes + int(sizeof(WeightShape::Ring));
static_assert(kProductBytes == FeatureShape::kStagesBytes + int(sizeof(FeatureShape::Ring)),
              "both products fill the same ring");

// A tile of dw has 128 classes x 256 features: the gradient of all rows times the features, less
// the projection. The cosines were made of the rounded weights, so the projection uses these too.
template <Math kMath, class W>
__device__ __forceinline__ void weight_tile(const ProductsParams& p, const unsigned char* smem,
                                            WeightShape::Ring& ring, WeightShape::State& state,
                                            const WgmmaLane& lane, int tile,
                                            float (&acc)[WeightShape::kAccumulators]) {
  using Shape = WeightShape;
  const CudaHead& head = p.head;
  const ProductTiles& tiles = p.schedule.weight;
  const bool per_class_kappa = p.out.kappa.data && head.kappa.stride != 0;
  const int col = tile % tiles.cols;
  const int column = tile / tiles.cols * Shape::kRows + lane.warpgroup * 64 + lane.line;

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
    const bool unit_rows = p.weight.unit_rows;
    factor[h] = outer_factor(*p.inv_loss_scale, rnorm, unit_rows);
    projected[h] =
        inside ? projection(sum_of(0), rnorm) / (unit_rows ? unit_scale(rnorm) : 1.0f) : 0.0f;
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
  Shape::template multiply<kMath>(smem, ring, state, lane, tiles.steps, acc);

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
          for (int i = 0; i < 4; ++i) out[i] += i % 2 ? old.pair[i / 2].high : old.pair[i / 2].low;
        }
      }
      store_as(to + k * 16, Four{round_pair<W>(out[0], out[1]), round_pair<W>(out[2], out[3])});
    }
  }
}

// Writes value(i) for the lane's i-th element of a tile of partial dx, 128 rows x 256 features, or
// adds it to what is there.
template <class F>
__device__ __forceinline__ void store_features(const ProductsParams& p, int64_t partial,
                                               const WgmmaLane& lane, int tile, bool add,
                                               const F& value) {
  const ProductTiles& tiles = p.schedule.features;
  const int64_t N = p.head.N, D = p.head.D;
  float* dx = p.dx.data + partial * N * D;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t n =
        tile / tiles.cols * FeatureShape::kRows + lane.warpgroup * 64 + lane.line + h * 8;
    if (n >= N) continue;
    float* to = dx + n * D;
    const int first = tile % tiles.cols * FeatureShape::kCols + lane.quad * 2, features = int(D);
    // Sixteen loads are in flight at once: the compiler would not move a load above a store that
    // may alias it.
    constexpr int kLoads = 16;
#pragma unroll
    for (int begin = 0; begin < FeatureShape::kCols / 8; begin += kLoads) {
      Pair<float> old[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int d = first + (begin + j) * 8;
        old[j] = add && d < features ? load_as<Pair<float>>(to + d) : Pair<float>{};
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int d = first + (begin + j) * 8, at = (begin + j) * 4 + h * 2;
        if (d < features)
          store_as(to + d, Pair<float>{old[j].low + value(at), old[j].high + value(at + 1)});
      }
    }
  }
}

// A part of a tile of dx: the chunk's gradient times its rounded weights, over a run of classes.
// The blocks that make a tile have a partial dx each. The last of them also clears those that are
// left, in the first chunk.
template <Math kMath>
__device__ __forceinline__ void feature_part(const ProductsParams& p, const unsigned char* smem,
                                             FeatureShape::Ring& ring, FeatureShape::State& state,
                                             const WgmmaLane& lane, Range steps,
                                             float (&acc)[FeatureShape::kAccumulators]) {
  const ProductSchedule& schedule = p.schedule;
  const int block = int(blockIdx.x), tile = steps.begin / schedule.features.steps;
  const int64_t turn = schedule.turn(block);
  const bool first_chunk = p.chunk.begin == 0;
  FeatureShape::template multiply<kMath>(smem, ring, state, lane, steps.end - steps.begin, acc);
  store_features(p, turn % p.dx.count, lane, tile, !first_chunk, [&](int i) { return acc[i]; });
  if (first_chunk && steps.end % schedule.features.steps == 0) {
    const int64_t first = schedule.turn(schedule.first_block(block, tile));
    for (int64_t other = turn + 1; other < first + p.dx.count; ++other)
      store_features(p, other % p.dx.count, lane, tile, false, [](int) { return 0.0f; });
  }
}

// Calls f with each part of a tile of dx that the block makes, as the range of its steps.
template <class F>
__device__ __forceinline__ void for_each_part(const ProductSchedule& schedule, const F& f) {
  const Range steps = schedule.feature_steps(int(blockIdx.x));
  for (int begin = steps.begin; begin < steps.end;) {
    const int tile_end = (begin / schedule.features.steps + 1) * schedule.features.steps;
    const int end = tile_end < steps.end ? tile_end : steps.end;
    f(Range{begin, end});
    begin = end;
  }
}

// Half of the blocks begin with dw and the others with dx, so that tiles of dw are written to
// memory all the time, and not all at once.
template <class Weight, class Features>
__device__ __forceinline__ void in_turn(const ProductsParams& p, const Weight& weight,
                                        const Features& features) {
  const Range tiles = p.schedule.weight_tiles(int(blockIdx.x));
  for (int half = 0; half < 2; ++half) {
    if ((int(blockIdx.x) + half) % 2 == 0) {
      if (p.class_outputs)
        for (int tile = tiles.begin; tile < tiles.end; ++tile) weight(tile);
    } else if (p.dx.data) {
      for_each_part(p.schedule, features);
    }
  }
}

template <Math kMath, class W>
__global__ void __launch_bounds__(kThreads, 1) products(const __grid_constant__ ProductsParams p) {
#ifdef TVMF_HOPPER
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& ring = *reinterpret_cast<WeightShape::Ring*>(smem + WeightShape::kStagesBytes);
  const WgmmaLane lane = WgmmaLane::of();
  ring.init();

  const auto produce = [&] {
    WeightShape::State state;
    const auto weight = [&](int tile) {
      const ProductTiles& tiles = p.schedule.weight;
      for (int step = 0; step < tiles.steps; ++step)
        WeightShape::copy(smem, ring, state, p.weight_maps.a, p.weight_maps.b,
                          tile / tiles.cols * kProductRows, tile % tiles.cols * kProductCols,
                          step * kDepth);
    };
    const auto features = [&](Range steps) {
      const ProductTiles& tiles = p.schedule.features;
      const int tile = steps.begin / tiles.steps;
      for (int step = steps.begin; step < steps.end; ++step)
        FeatureShape::copy(smem, ring, state, p.feature_maps.a, p.feature_maps.b,
                           tile / tiles.cols * kProductRows, tile % tiles.cols * kProductCols,
                           (step - tile * tiles.steps) * kDepth);
    };
    in_turn(p, weight, features);
  };
  const auto consume = [&] {
    WeightShape::State state;
    float acc[WeightShape::kAccumulators];
    in_turn(
        p, [&](int tile) { weight_tile<kMath, W>(p, smem, ring, state, lane, tile, acc); },
        [&](Range steps) { feature_part<kMath>(p, smem, ring, state, lane, steps, acc); });
  };
  produce_and_consume(p.class_outputs ? p.weight_maps : p.feature_maps, lane, produce, consume);
#else
  no_such_instructions();
#endif
}

}  // namespace

cudaError_t launch_products(const ProductsParams& p, const Plan& plan, cudaStream_t stream) {
  const auto launch = [&](auto math) {
    constexpr Math kMath = decltype(math)::value;
    using X = typename MathTraits<kMath>::X;
    const bool rounded = plan.narrow_weight && !plan.adds_gradients();
    return launch_kernel(rounded ? products<kMath, X> : products<kMath, float>,
                         dim3(unsigned(p.schedule.blocks)), kThreads, kProductBytes, stream, p);
  };
  return plan.math == Math::kBf16 ? launch(MathConstant<Math::kBf16>{})
                                  : launch(MathConstant<Math::kF16>{});
}

}  // namespace tvmf::sm90
