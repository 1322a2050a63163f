// Backward pass on Hopper, a chunk of classes at a time: cosines again and the gradient tile, with
// the rounded weights beside it; the weight gradient with its projection; the features' gradient.
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/sm90.h"

namespace tvmf::sm90 {
namespace {

struct GradientParams {
  BackwardParams<float> p;
  TensorMap weight, x;
  int class_tiles, row_blocks, walkers;
  int64_t grad_stride;  // of p.grad
  uint16_t* rounded;    // [chunk, weight_stride]
  int64_t weight_stride;
};

template <class Shape>
struct GradientPlan {
  // Of every row, in the order in which they are read.
  struct Tail {
    typename Shape::Ring ring;
    float rnorm[Shape::kRows], rnorm_gain[Shape::kRows], max[Shape::kRows];
    float lse[Shape::kRows];     // dL/dlse / sum_exp
    float target[Shape::kRows];  // dL/dtarget
    float sum[Shape::kRows];     // dL/dsum
    float target_product[Shape::kRows];
    int label[Shape::kRows];
  };
  struct Sums {
    float dot[kConsumerWarps][Shape::kProductRows];
  };
  static_assert(sizeof(Sums) <= Shape::kStagesBytes);
  static constexpr int kBytes = Shape::kStagesBytes + int(sizeof(Tail));
  static_assert(kBytes <= 232448);
};

// kAll: with the gradients of kappa and bias, and of `sum`.
template <Math kMath, class Shape, bool kAll>
__global__ void __launch_bounds__(kThreads, 1)
    gradient(const __grid_constant__ GradientParams params) {
#ifdef TVMF_HOPPER
  using Plan = GradientPlan<Shape>;
  constexpr int kGroups = Shape::kProductRows / 32;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& tail = *reinterpret_cast<typename Plan::Tail*>(smem + Shape::kStagesBytes);
  const BackwardParams<float>& p = params.p;
  const CudaHead& head = p.head;
  const int row_block = int(blockIdx.x) % params.row_blocks, first_row = row_block * Shape::kRows;
  const int walker = int(blockIdx.x) / params.row_blocks;
  const int steps = int((head.D + kDepth - 1) / kDepth);
  const WgmmaLane lane = WgmmaLane::of();

  // Fetch the rows' terms.
  for (int i = threadIdx.x; i < Shape::kRows; i += kThreads) {
    const int n = first_row + i;
    const bool inside = n < head.N;
    const auto row = inside ? load_as<GradientRow<float>>(p.rows + n) : GradientRow<float>{};
    tail.rnorm[i] = row.rnorm;
    tail.rnorm_gain[i] = row.rnorm_gain;
    tail.max[i] = inside ? row.max : -kLowest<float>;  // no exponential overflows, or 0 times it
    tail.lse[i] = row.grad_lse * row.inv_sum_exp;
    tail.target[i] = row.grad_target;
    tail.sum[i] = row.grad_sum;
    tail.target_product[i] = row.target_product;
    tail.label[i] = inside ? int(row.label) : -1;
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
          Shape::copy(smem, tail.ring, place, params.weight, params.x,
                      int(p.chunk_begin) + tile * Shape::kClasses, first_row, step);
    }
  } else {
    take_registers<kConsumerRegisters>();
    const float scale = Scale<float>::of(head).value;
    uint16_t* grad = static_cast<uint16_t*>(p.grad);
    const int warp_row = Shape::kSplitRows ? lane.warpgroup * Shape::kProductRows : 0;
    const int slot = Shape::kSplitRows ? row_block * kConsumers + lane.warpgroup : row_block;
    typename Shape::Place place;
    float acc[Shape::kAccumulators];
    float row_dot[kGroups] = {};
    float total_scale = 0, total_kappa = 0;

    for (int tile = walker; tile < params.class_tiles; tile += params.walkers) {
      const int first_column = tile * Shape::kClasses +  // of the chunk's classes
                               (Shape::kSplitRows ? 0 : lane.warpgroup * 64) + lane.warp % 4 * 16;
      const int column = first_column + lane.group;
      const int first_class = int(p.chunk_begin) + first_column;
      ClassPair classes;
      float weight_gain[2], col_dot[2] = {}, col_bias[2] = {}, col_kappa[2] = {};
      bool inside[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t c = p.chunk_begin + column + h * 8;
        inside[h] = c < head.C;
        classes.terms[h] = ClassValues<float>::of(head, c, scale);
        classes.rnorm[h] = inside[h] ? p.saved[p.layout.weight_rnorm + c] : 0.0f;
        weight_gain[h] = inner_rnorm(classes.rnorm[h], p.float16);
      }
      // The blocks of a tile take turns to write the rounded weights.
      const bool keep = tile % params.row_blocks == row_block && warp_row == 0;
      const auto use = [&](int step, int half, const uint32_t* pairs) {
        const int64_t d = step * kDepth + half * 32 + lane.quad * 8;
        if (!keep || d >= params.weight_stride) return;
        struct alignas(16) Four {
          uint32_t v[4];
        };
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (inside[h])
            store_as(params.rounded + (column + h * 8) * params.weight_stride + d,
                     Four{pairs[h], pairs[2 + h], pairs[4 + h], pairs[6 + h]});
      };
      float squares[2] = {};
      Shape::template multiply<kMath>(smem, tail.ring, place, lane, steps, acc, squares, use);
      const unsigned targets =
          groups_with_target<kGroups>(tail.label + warp_row, first_class, lane.lane);

#pragma unroll
      for (int b = 0; b < kGroups; ++b) {
        const int row = warp_row + b * 32 + lane.quad * 8;  // of the block's rows
        float x_rnorm[8], rnorm_gain[8], max[8], lse[8], sum[8], dot[8], scaled[2][8];
        load_rows(x_rnorm, tail.rnorm, row);
        load_rows(rnorm_gain, tail.rnorm_gain, row);
        load_rows(max, tail.max, row);
        load_rows(lse, tail.lse, row);
        if constexpr (kAll) load_rows(sum, tail.sum, row);
        const auto rows = [&](auto with_target) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            dot[i] = 0;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const auto& terms = classes.terms[h];
              float product = acc[accumulator_of(b, i, h)];
              bool is_target = false;
              if constexpr (decltype(with_target)::value) {
                is_target = tail.label[row + i] == first_class + lane.group + h * 8;
                if (is_target) product = tail.target_product[row + i];
              }
              const float cosine = cosine_of(product, x_rnorm[i], classes.rnorm[h]);
              const auto s = similarity_with_gradient(cosine, terms.kappa);
              const float logit = logit_of(scale, s.phi, terms.offset);
              float g = lse[i] * exp_of(logit - max[i]);
              if (is_target) g += tail.target[row + i];
              if constexpr (kAll)
                if (p.with_sum) g += sum[i] * terms.omega;
              const float t = g * scale * s.dphi_dcosine;
              dot[i] = fma(t, cosine, dot[i]);
              col_dot[h] = fma(t, cosine, col_dot[h]);
              if constexpr (kAll) {
                col_bias[h] += g;
                col_kappa[h] = fma(g, s.dphi_dkappa, col_kappa[h]);
              }
              total_scale = fma(g, s.phi + terms.bias, total_scale);
              scaled[h][i] = t * rnorm_gain[i] * weight_gain[h];
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
        if (n < params.grad_stride)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (inside[h])
              store_as(grad + (column + h * 8) * params.grad_stride + n,
                       Four{pack<kMath>(scaled[h][0], scaled[h][1]),
                            pack<kMath>(scaled[h][2], scaled[h][3]),
                            pack<kMath>(scaled[h][4], scaled[h][5]),
                            pack<kMath>(scaled[h][6], scaled[h][7])});
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        total_kappa += col_kappa[h];
        const float sums[3] = {quad_sum(col_dot[h]), quad_sum(col_bias[h]), quad_sum(col_kappa[h])};
        if (lane.quad == 0 && inside[h])
#pragma unroll
          for (int which = 0; which < 3; ++which)
            p.col_sums[(slot * 3 + which) * p.chunk + column + h * 8] = sums[which];
      }
    }

    const double warp_scale = warp_sum(double(total_scale)),
                 warp_kappa = warp_sum(double(total_kappa)) * double(scale);
    if (lane.lane == 0) {
      double* totals = p.totals + 2 * (int64_t(blockIdx.x) * kConsumerWarps + lane.warp);
      totals[0] = p.chunk_begin == 0 ? warp_scale : totals[0] + warp_scale;
      totals[1] = p.chunk_begin == 0 ? warp_kappa : totals[1] + warp_kappa;
    }
    // Merge the warps that have the same rows, in order.
    auto& sums = *reinterpret_cast<typename Plan::Sums*>(smem);
    consumer_sync();
#pragma unroll
    for (int b = 0; b < kGroups; ++b)
      sums.dot[lane.warp][b * 32 + lane.quad * 8 + lane.group] = row_dot[b];
    consumer_sync();
    constexpr int kWarps = Shape::kSplitRows ? kConsumerWarps / 2 : kConsumerWarps;
    for (int i = threadIdx.x; i < Shape::kRows; i += kConsumers * kWarpgroup) {
      const int n = first_row + i, first_warp = i / Shape::kProductRows * kWarps;
      if (n >= head.N) break;
      float dot = 0;
      for (int w = first_warp; w < first_warp + kWarps; ++w)
        dot += sums.dot[w][i % Shape::kProductRows];
      float& sum = p.row_dot[int64_t(walker) * head.N + n];
      sum = p.chunk_begin == 0 ? dot : sum + dot;
    }
  }
#else
  no_such_instructions();
#endif
}

struct ProductParams {
  BackwardParams<float> p;
  TensorMap a, b;
  int row_tiles, col_tiles;
  int steps, slots;         // slots: of p.col_sums
  const uint16_t* rounded;  // [chunk, weight_stride]
  int64_t weight_stride;
};

template <class Shape>
constexpr int kProductBytes = Shape::kStagesBytes + int(sizeof(typename Shape::Ring));

// dw of 128 classes x 256 features: all rows' gradient tile by the features, less the projection on
// the rounded weights, whose cosines these are.
template <Math kMath>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradient(const __grid_constant__ ProductParams params) {
#ifdef TVMF_HOPPER
  using Shape = ProductShape<false>;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& ring = *reinterpret_cast<typename Shape::Ring*>(smem + Shape::kStagesBytes);
  const BackwardParams<float>& p = params.p;
  const CudaHead& head = p.head;
  const int tiles = params.row_tiles * params.col_tiles;
  const WgmmaLane lane = WgmmaLane::of();
  ring.init();

  if (lane.warpgroup == kConsumers) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) {
      prefetch_map(params.a);
      prefetch_map(params.b);
      typename Shape::Place place;
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
        for (int step = 0; step < params.steps; ++step)
          Shape::copy(smem, ring, place, params.a, params.b, tile / params.col_tiles * Shape::kRows,
                      tile % params.col_tiles * Shape::kCols, step * kDepth);
    }
  } else {
    take_registers<kConsumerRegisters>();
    typename Shape::Place place;
    float acc[Shape::kAccumulators];
    const bool per_class_kappa = p.out.kappa.data && head.kappa.stride != 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int col = tile % params.col_tiles;
      const int column = tile / params.col_tiles * Shape::kRows + lane.warpgroup * 64 + lane.line;

      // Finish the column sums: the projection's factor, and the gradients of bias and kappa.
      float gain[2], factor[2];
      bool wanted[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // The last block of small tiles can reach into the next chunk.
        const int64_t c = p.chunk_begin + column + h * 8;
        const bool inside = column + h * 8 < p.chunk_count;
        wanted[h] = inside && p.out.weight.data;
        const float rnorm = inside ? p.saved[p.layout.weight_rnorm + c] : 0.0f;
        const auto sum_of = [&](int which) {
          float sum = 0;
          for (int s = 0; s < params.slots; ++s)
            sum += p.col_sums[(s * 3 + which) * p.chunk + column + h * 8];
          return sum;
        };
        gain[h] = p.gain[1] * (inner_rnorm(rnorm, p.float16) == rnorm ? 1.0f : rnorm);
        factor[h] = inside ? projection(sum_of(0), rnorm) : 0.0f;
        if (col == 0 && lane.quad == 0 && inside) {
          const float scale = Scale<float>::of(head).value;
          if (p.out.bias.data) store_at(p.out.bias, c, scale * sum_of(1));
          if (per_class_kappa) store_at(p.out.kappa, c, scale * sum_of(2));
        }
      }
      // The projection's weights are on their way while the products are made.
      struct alignas(8) Rounded {
        uint32_t pair[2];
      };
      constexpr int kRuns = Shape::kCols / 16;
      const int first_feature = col * Shape::kCols + lane.quad * 4, features = int(head.D);
      Rounded w[2][kRuns];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint16_t* from = params.rounded + int64_t(column + h * 8) * params.weight_stride;
#pragma unroll
        for (int k = 0; k < kRuns; ++k) {
          const bool there = wanted[h] && first_feature + k * 16 < features;
          w[h][k] = there ? load_as<Rounded>(from + first_feature + k * 16) : Rounded{};
        }
      }
      Shape::template multiply<kMath>(smem, ring, place, lane, params.steps, acc);

#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!wanted[h]) continue;
        float* to = static_cast<float*>(p.out.weight.data) +
                    (p.chunk_begin + column + h * 8) * head.D + first_feature;
        struct alignas(16) Four {
          float v[4];
        };
#pragma unroll
        for (int k = 0; k < kRuns; ++k) {
          Four out;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            out.v[i] = gain[h] * acc[(k * 2 + i / 2) * 4 + h * 2 + i % 2] -
                       factor[h] * half_of<kMath>(w[h][k].pair[i / 2], i % 2);
          if (first_feature + k * 16 < features) store_as(to + k * 16, out);
        }
      }
    }
  }
#else
  no_such_instructions();
#endif
}

// The chunk's gradient tile times its weights, 128 rows x 256 features of one run of classes.
template <Math kMath>
__global__ void __launch_bounds__(kThreads, 1)
    feature_gradient(const __grid_constant__ ProductParams params) {
#ifdef TVMF_HOPPER
  using Shape = ProductShape<true>;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& ring = *reinterpret_cast<typename Shape::Ring*>(smem + Shape::kStagesBytes);
  const BackwardParams<float>& p = params.p;
  const CudaHead& head = p.head;
  const int tiles = params.row_tiles * params.col_tiles;
  const int tile = int(blockIdx.x) % tiles, split = int(blockIdx.x) / tiles;
  const int row = tile / params.col_tiles * Shape::kRows;
  const int col = tile % params.col_tiles * Shape::kCols;
  const int splits = int(p.input_splits), per_split = (params.steps + splits - 1) / splits;
  const int first_step = split * per_split, left = params.steps - first_step;
  const int steps = left < per_split ? left : per_split;
  const WgmmaLane lane = WgmmaLane::of();
  ring.init();

  if (lane.warpgroup == kConsumers) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) {
      prefetch_map(params.a);
      prefetch_map(params.b);
      typename Shape::Place place;
      for (int step = 0; step < steps; ++step)
        Shape::copy(smem, ring, place, params.a, params.b, row, col, (first_step + step) * kDepth);
    }
  } else {
    take_registers<kConsumerRegisters>();
    const bool add = p.chunk_begin > 0;
    if (steps > 0 || !add) {
      typename Shape::Place place;
      float acc[Shape::kAccumulators];
      if (steps > 0)
        Shape::template multiply<kMath>(smem, ring, place, lane, steps, acc);
      else
        for (float& each : acc) each = 0;
      float* dx = p.dx + int64_t(split) * head.N * head.D;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t n = row + lane.warpgroup * 64 + lane.line + h * 8;
        if (n >= head.N) continue;
        float* to = dx + n * head.D;
        const int first = col + lane.quad * 2, features = int(head.D);
        // Sixteen loads are under way at once; stores could alias what is still to be read.
        constexpr int kLoads = 16;
#pragma unroll
        for (int begin = 0; begin < Shape::kCols / 8; begin += kLoads) {
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
              store_as(to + d, Pair<float>{old[j].low + acc[at], old[j].high + acc[at + 1]});
          }
        }
      }
    }
  }
#else
  no_such_instructions();
#endif
}

template <Math kMath, class Shape>
cudaError_t launch_gradient(const BackwardParams<float>& p, const CudaPlan& plan, void* rounded,
                            cudaStream_t stream) {
  const HopperPlan& hopper = plan.hopper;
  const CudaHead& head = p.head;
  GradientParams params{p,
                        {},
                        {},
                        int(ceil_div(p.chunk_count, Shape::kClasses)),
                        int(hopper.row_blocks),
                        int(hopper.gradient_walkers),
                        hopper.grad_stride,
                        static_cast<uint16_t*>(rounded),
                        hopper.weight_stride};
  cudaError_t error = make_tensor_map(&params.weight, head.weight.data, DType::kFloat32, head.C,
                                      head.D, head.weight.row_stride, Shape::kClasses, 32);
  if (error == cudaSuccess)
    error = make_tensor_map(&params.x, p.arranged.by_rows, plan.problem.x, hopper.rows,
                            hopper.columns, hopper.columns, Shape::kRows, kDepth);
  if (error != cudaSuccess) return error;
  const dim3 grid(unsigned(hopper.row_blocks * hopper.gradient_walkers));
  const auto run = [&](auto kernel) {
    return launch_kernel(kernel, grid, kThreads, GradientPlan<Shape>::kBytes, stream, params);
  };
  const bool all = p.with_sum || p.out.bias.data || p.out.kappa.data;
  return all ? run(gradient<kMath, Shape, true>) : run(gradient<kMath, Shape, false>);
}

template <Math kMath>
cudaError_t launch_weight(const BackwardParams<float>& p, const CudaPlan& plan, const void* rounded,
                          cudaStream_t stream) {
  using Shape = ProductShape<false>;
  const HopperPlan& hopper = plan.hopper;
  const CudaHead& head = p.head;
  ProductParams params{p, {}, {}, 0, 0, 0, 0, static_cast<const uint16_t*>(rounded), 0};
  params.row_tiles = int(ceil_div(p.chunk_count, Shape::kRows));
  params.col_tiles = int(ceil_div(head.D, Shape::kCols));
  params.steps = int(ceil_div(head.N, kDepth));
  params.slots = int(hopper.col_slots);
  params.weight_stride = hopper.weight_stride;
  cudaError_t error = make_tensor_map(&params.a, p.grad, plan.problem.x, p.chunk_count, head.N,
                                      hopper.grad_stride, Shape::kRows, kDepth);
  if (error == cudaSuccess)
    error = make_tensor_map(&params.b, p.arranged.by_columns, plan.problem.x, head.N,
                            hopper.columns, hopper.columns, kDepth, kAtom);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min(int64_t(params.row_tiles) * params.col_tiles, hopper.blocks);
  return launch_kernel(weight_gradient<kMath>, dim3(unsigned(blocks)), kThreads,
                       kProductBytes<Shape>, stream, params);
}

template <Math kMath>
cudaError_t launch_features(const BackwardParams<float>& p, const CudaPlan& plan,
                            const void* rounded, cudaStream_t stream) {
  using Shape = ProductShape<true>;
  const HopperPlan& hopper = plan.hopper;
  const CudaHead& head = p.head;
  ProductParams params{p, {}, {}, 0, 0, 0, 0, nullptr, 0};
  params.row_tiles = int(ceil_div(head.N, Shape::kRows));
  params.col_tiles = int(ceil_div(head.D, Shape::kCols));
  params.steps = int(ceil_div(p.chunk_count, kDepth));
  cudaError_t error = make_tensor_map(&params.a, p.grad, plan.problem.x, p.chunk_count, head.N,
                                      hopper.grad_stride, kDepth, kAtom);
  if (error == cudaSuccess)
    error = make_tensor_map(&params.b, rounded, plan.problem.x, p.chunk_count, head.D,
                            hopper.weight_stride, kDepth, kAtom);
  if (error != cudaSuccess) return error;
  const int64_t blocks = int64_t(params.row_tiles) * params.col_tiles * p.input_splits;
  return launch_kernel(feature_gradient<kMath>, dim3(unsigned(blocks)), kThreads,
                       kProductBytes<Shape>, stream, params);
}

}  // namespace

cudaError_t class_gradients(const BackwardParams<float>& given, const CudaPlan& plan, void* rounded,
                            cudaStream_t stream) {
  BackwardParams<float> p = given;
  const CudaHead& head = p.head;
  cudaError_t error = cudaSuccess;
  for (int64_t begin = 0; begin < head.C && error == cudaSuccess; begin += plan.chunk) {
    p.chunk_begin = begin;
    p.chunk_count = std::min(plan.chunk, head.C - begin);
    error = with_cosine_shape(plan, [&](auto math, auto shape) {
      constexpr Math kMath = decltype(math)::value;
      cudaError_t each = launch_gradient<kMath, decltype(shape)>(p, plan, rounded, stream);
      const bool class_outputs = p.out.weight.data || p.out.bias.data || p.out.kappa.data;
      if (each == cudaSuccess && class_outputs)
        each = launch_weight<kMath>(p, plan, rounded, stream);
      if (each == cudaSuccess && p.out.x.data)
        each = launch_features<kMath>(p, plan, rounded, stream);
      return each;
    });
  }
  return error;
}

}  // namespace tvmf::sm90
