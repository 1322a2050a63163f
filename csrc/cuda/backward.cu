// Backward pass: the gradients of the rows' statistics; for each chunk of classes its tile
// t_nc = dL/dcosine, the weight gradient with its projection in the same block, and the product for
// the features' gradient; then that gradient's projection.
//   dw_c = q_c (sum_n t r_n x_n - (sum_n t c) q_c w_c)     dx_n = r_n (sum_c t q_c w_c - ...)
#include "cuda/passes.cuh"
#include "cuda/sm80/mainloop.cuh"
#include "cuda/sm90/sm90.h"

namespace tvmf {
namespace {

template <class T>
__device__ __forceinline__ void store_row(GradientRow<T>* to, const GradientRow<T>& row) {
  struct Parts {
    Bytes16 part[sizeof(GradientRow<T>) / 16];
  };
  const auto parts = bits_as<Parts>(row);
#pragma unroll
  for (int i = 0; i < int(sizeof(Parts) / 16); ++i)
    reinterpret_cast<Bytes16*>(to)[i] = parts.part[i];
}

constexpr int kPrepareThreads = 512;

// One block: dL/dlse, dL/dtarget and dL/dsum of every row, and the gain of float16's gradient tile.
// It is all latency: a row's terms are under way while sums are made over all rows and classes.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads, 1)
    prepare_gradient(const __grid_constant__ BackwardParams<T> p) {
  double* smem = static_cast<double*>(shared_memory());
  const CudaHead& head = p.head;
  if (blockIdx.x > 0) {
    arrange(head, p.arranged, int64_t(blockIdx.x - 1) * kPrepareThreads + threadIdx.x);
    return;
  }
  const bool of_loss = p.upstream.loss.data, mean = p.options.reduction == Reduction::kMean;
  const double keep = 1 - p.options.label_smoothing, smooth = p.options.label_smoothing / head.C;
  const auto label_of = [&](int64_t target) {
    return target == head.ignore_index ? -1 : target >= 0 && target < head.C ? target : -2;
  };
  const auto omega_of = [&](int64_t label) {
    return double(value_at<T>(head.class_weight, label));
  };
  struct Terms {
    int64_t target;
    T rnorm, max, sum_exp, target_product;
    T upstream[3];  // of the loss, or of lse, target and sum
  };
  const auto terms_of = [&](int64_t n) {
    if (n >= head.N) return Terms{};
    const T* saved = p.saved + n;
    Terms terms{head.target[n * head.target_stride],
                saved[p.layout.x_rnorm],
                saved[p.layout.max],
                saved[p.layout.sum_exp],
                saved[p.layout.target_product],
                {}};
    if (of_loss) {
      terms.upstream[0] = value_at<T>(p.upstream.loss, n);
    } else {
      terms.upstream[0] = value_at<T>(p.upstream.lse, n);
      terms.upstream[1] = value_at<T>(p.upstream.target, n);
      terms.upstream[2] = value_at<T>(p.upstream.sum, n);
    }
    return terms;
  };
  Terms next = terms_of(threadIdx.x);

  double sums[2] = {};    // of the rows' weights and of the classes'
  double maxima[3] = {};  // of the classes' weights, of phi' and of the classes' 1/norm
  if (of_loss && mean) {
    for (int64_t n = threadIdx.x; n < head.N; n += kPrepareThreads) {
      const int64_t label = label_of(head.target[n * head.target_stride]);
      sums[0] += label == -1 ? 0 : label == -2 ? 1 : omega_of(label);
    }
  }
  const bool weighted = head.class_weight.data;
  if (p.with_sum && weighted) {
    for_values<T>(head.class_weight, head.C, [&](double omega) {
      sums[1] += omega;
      maxima[0] = larger(omega, maxima[0]);
    });
  }
  if (p.float16) {
    const auto note_kappa = [&](double kappa) {
      maxima[1] = larger(kappa > 0 ? 1 + 2 * kappa : 1 / (1 + 2 * kappa), maxima[1]);
    };
    if (head.kappa.data && head.kappa.stride != 0)
      for_values<T>(head.kappa, head.C, note_kappa);
    else
      note_kappa(value_at<T>(head.kappa, 0));
    const VectorRef rnorms{p.saved + p.layout.weight_rnorm, DType::kFloat32, 1, 0};
    for_values<T>(rnorms, head.C, [&](T rnorm) {
      maxima[2] = larger(double(inner_rnorm(rnorm, true)), maxima[2]);
    });
  }
  if ((of_loss && mean) || (p.with_sum && weighted)) block_sums(sums, smem);
  if ((p.with_sum && weighted) || p.float16) block_maxima(maxima, smem);
  const double total_weight = sums[0];
  const double omega_sum = weighted ? sums[1] : head.class_weight.value * double(head.C);
  const double omega_max = weighted ? maxima[0] : head.class_weight.value;

  double largest[1] = {};
  for (int64_t n = threadIdx.x; n < head.N; n += kPrepareThreads) {
    const Terms terms = next;
    next = terms_of(n + kPrepareThreads);
    const int64_t label = label_of(terms.target);
    T a = 0, b = 0, s = 0;
    if (of_loss) {
      if (label >= 0) {
        double g = terms.upstream[0];
        if (mean) g /= total_weight;
        const double weight = keep * omega_of(label);
        a = T(g * (weight + smooth * omega_sum));
        b = T(-g * weight);
        s = T(-g * smooth);
      }
    } else {
      a = terms.upstream[0];
      b = terms.upstream[1];
      s = terms.upstream[2];
    }
    if (label == -2) a = b = s = T(__builtin_nan(""));
    const T inner = inner_rnorm(terms.rnorm, p.float16);
    store_row(p.rows + n, {terms.rnorm, inner, terms.max, 1 / terms.sum_exp, a, b, s,
                           terms.target_product, label, 0});
    const double bound = fabs(double(a)) + fabs(double(b)) + fabs(double(s)) * omega_max;
    largest[0] = larger(bound * double(inner), largest[0]);
  }
  if (!p.float16) {
    if (threadIdx.x == 0) p.gain[0] = p.gain[1] = 1;
    return;
  }

  // |t r q| <= largest * scale * max phi' * max q: bring that to 2^12 of float16's 2^16.
  block_maxima(largest, smem);
  const double bound = largest[0] * maxima[1] * maxima[2] * double(Scale<T>::of(head).value);
  const int exponent = bound > 1e-30 && bound < 1e30 ? 12 - ilogb(bound) : 0;
  const T gain = T(exp2(double(exponent)));
  if (threadIdx.x == 0) p.gain[0] = gain, p.gain[1] = 1 / gain;
  for (int64_t n = threadIdx.x; n < head.N; n += kPrepareThreads) p.rows[n].rnorm_gain *= gain;
}

template <Math kMath, class W>
struct ClassGradientPlan {
  using X = typename MathTraits<kMath>::X;
  using T = typename MathTraits<kMath>::Acc;
  // Cosines: rows x classes.
  using LayoutX = OperandTile<X, GradientTile::kRows, kMath, false>;
  using LayoutW = OperandTile<W, GradientTile::kCols, kMath, false>;
  // Weight gradient: classes x features, summed over rows.
  using LayoutG = OperandTile<X, WeightTile::kRows, kMath, true>;
  using LayoutXt = OperandTile<X, WeightTile::kCols, kMath, true>;
  static constexpr int kCosineStage = LayoutX::kBytes + LayoutW::kBytes;
  static constexpr int kWeightStage = LayoutG::kBytes + LayoutXt::kBytes;
  static constexpr int kStageBytes = kCosineStage > kWeightStage ? kCosineStage : kWeightStage;
  static constexpr int kStagesBytes = kStages<kMath, W> * kStageBytes;

  struct Tail {
    ClassTile<T, GradientTile::kCols> classes;
    T col_sums[GradientTile::kWarpsRow][3][GradientTile::kCols];
    T gain[GradientTile::kCols], projection[GradientTile::kCols];
    double sums[GradientTile::kThreads / kWarp];
  };
  static constexpr int kBytes = kStagesBytes + int(sizeof(Tail));
  static_assert(kBytes == gradient_shared_bytes(kMath), "the plan counts on it");
  static int shared_bytes(const CudaPlan& plan) {
    const int64_t rows = round_up(plan.problem.N, GradientTile::kRows);
    return kBytes + (plan.resident ? int(rows * LayoutG::kLineBytes) : 0);
  }
};

template <class X, class T>
__device__ __forceinline__ Pair<X> round_pair(T low, T high) {
  if constexpr (sizeof(X) >= 4)
    return {X(low), X(high)};
  else if constexpr (std::is_same_v<X, bf16>)
    return bits_as<Pair<X>>(pack_bf16(low, high));
  else
    return bits_as<Pair<X>>(pack_f16(low, high));
}

// Two neighbours of a contiguous gradient; `both` are inside and aligned.
template <class T>
__device__ __forceinline__ void store_pair_at(const GradientRef& to, int64_t i, T low, T high,
                                              bool both) {
  if (!both) {
    store_at(to, i, low);
    return;
  }
  switch (to.dtype) {
    case DType::kFloat16:
      store_as(static_cast<f16*>(to.data) + i, round_pair<f16>(float(low), float(high)));
      break;
    case DType::kBFloat16:
      store_as(static_cast<bf16*>(to.data) + i, round_pair<bf16>(float(low), float(high)));
      break;
    case DType::kFloat32:
      store_as(static_cast<float*>(to.data) + i, Pair<float>{float(low), float(high)});
      break;
    default: store_as(static_cast<double*>(to.data) + i, Pair<double>{double(low), double(high)});
  }
}

// A block owns 64 classes. It makes the gradient tile of its rows, and from that of all rows the
// classes' weight gradient: the column sums that the projection needs are its own.
template <Math kMath, class W>
__global__ void __launch_bounds__(GradientTile::kThreads, kMath == Math::kF64 ? 1 : 2)
    class_gradient(const __grid_constant__ BackwardParams<typename MathTraits<kMath>::Acc> p) {
  using Plan = ClassGradientPlan<kMath, W>;
  using X = typename Plan::X;
  using T = typename Plan::T;
  using LayoutX = typename Plan::LayoutX;
  using LayoutW = typename Plan::LayoutW;
  using LayoutG = typename Plan::LayoutG;
  using LayoutXt = typename Plan::LayoutXt;
  constexpr int kClasses = GradientTile::kCols, kThreads = GradientTile::kThreads;
  constexpr int kDepth = kTileD<kMath>, kPipeline = kStages<kMath, W>;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  auto& tail = *reinterpret_cast<typename Plan::Tail*>(smem + Plan::kStagesBytes);
  unsigned char* grad_smem = smem + Plan::kBytes;
  const CudaHead& head = p.head;
  const auto x = Operand<X>::of(head.x.data, head.x.row_stride, head.x.col_stride, head.N, head.D);
  const auto weight = Operand<W>::of(head.weight.data, head.weight.row_stride,
                                     head.weight.col_stride, head.C, head.D);
  X* grad = static_cast<X*>(p.grad);
  const int64_t first_column = int64_t(blockIdx.x) * kClasses;  // of the chunk
  const int64_t first_class = p.chunk_begin + first_column;
  const int64_t slot = blockIdx.y;
  // Where blocks share a tile's weight gradient each makes the tile; one of them hands it on.
  const bool first = !p.fused || blockIdx.y == 0;

  if (p.make_gradient) {
    const Lane lane = Lane::of<GradientTile>();
    const T scale = Scale<T>::of(head).value;
    for (int i = threadIdx.x; i < kClasses; i += kThreads) {
      const int64_t c = first_class + i;
      tail.classes.set(i, ClassValues<T>::of(head, c, scale));
      tail.classes.rnorm[i] = c < head.C ? p.saved[p.layout.weight_rnorm + c] : T(0);
    }

    const int64_t all_tiles = (head.N + GradientTile::kRows - 1) / GradientTile::kRows;
    const int64_t groups = p.fused ? 1 : p.row_groups;
    const int64_t per_group = (all_tiles + groups - 1) / groups;
    const int64_t first_tile = p.fused ? 0 : blockIdx.y * per_group;
    const int64_t left = all_tiles - first_tile;
    const int tiles = int(left < per_group ? left : per_group);

    T acc[GradientTile::kFragsRow][GradientTile::kFragsCol][4];
    clear(acc);
    T col_dot[GradientTile::kFragsCol][2] = {}, col_bias[GradientTile::kFragsCol][2] = {},
      col_kappa[GradientTile::kFragsCol][2] = {}, total_scale = 0;

    const auto finish = [&](int tile) {
      const int64_t first_row = (first_tile + tile) * GradientTile::kRows;
#pragma unroll
      for (int r = 0; r < 2 * GradientTile::kFragsRow; ++r) {
        const int i = r / 2, half = r % 2 * 2;
        const int64_t n = first_row + lane.row<GradientTile>(i, r % 2);
        const bool inside = n < head.N;
        const GradientRow<T> row = inside ? load_as<GradientRow<T>>(p.rows + n) : GradientRow<T>{};
        const int64_t label = (inside ? row.label : -1) - first_class;
        T row_dot = 0;
#pragma unroll
        for (int j = 0; j < GradientTile::kFragsCol; ++j) {
          const int col = lane.col<GradientTile>(j);
          T scaled[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = col + e;
            const T rnorm = tail.classes.rnorm[c];
            const T product = label == c ? row.target_product : acc[i][j][half + e];
            const T cosine = cosine_of(product, row.rnorm, rnorm);
            const auto s = similarity_with_gradient(cosine, tail.classes.kappa[c]);
            const T logit = logit_of(scale, s.phi, tail.classes.offset[c]);
            const T probability = exp_of(logit - row.max) * row.inv_sum_exp;
            T g = row.grad_lse * probability;
            if (label == c) g += row.grad_target;
            if (p.with_sum) g += row.grad_sum * tail.classes.omega[c];
            // Rows and classes beyond the last have no gradient, whatever the others hold.
            if (!inside || first_class + c >= head.C) g = 0;
            const T t = g * scale * s.dphi_dcosine;
            row_dot += t * cosine;
            col_dot[j][e] += t * cosine;
            col_bias[j][e] += g;
            col_kappa[j][e] += g * s.dphi_dkappa;
            total_scale += g * (s.phi + tail.classes.bias[c]);
            scaled[e] = t * row.rnorm_gain * inner_rnorm(rnorm, p.float16);
          }
          const Pair<X> pair = round_pair<X>(scaled[0], scaled[1]);
          if (p.resident) store_as(grad_smem + LayoutG::offset(int(n), col), pair);
          if (first && inside && (p.out.x.data || !p.resident))
            store_as(grad + n * p.chunk + first_column + col, pair);
        }
        row_dot = quad_sum(row_dot);
        if (first && inside && lane.quad == 0) {
          T& sum = p.row_dot[(blockIdx.x * GradientTile::kWarpsCol + lane.warp_col) * head.N + n];
          sum = p.chunk_begin == 0 ? row_dot : sum + row_dot;
        }
      }
      clear(acc);
    };

    if (p.kept > 0) {
      // Take the products that the forward pass kept.
      __syncthreads();
      for (int tile = 0; tile < tiles; ++tile) {
        const int64_t first_row = (first_tile + tile) * GradientTile::kRows;
#pragma unroll
        for (int r = 0; r < 2 * GradientTile::kFragsRow; ++r) {
          const int64_t n = first_row + lane.row<GradientTile>(r / 2, r % 2);
#pragma unroll
          for (int j = 0; j < GradientTile::kFragsCol; ++j) {
            const int64_t c = first_class + lane.col<GradientTile>(j);
            if (n >= head.N || c >= p.kept) continue;
            const Pair<T> pair = load_as<Pair<T>>(p.saved + p.layout.product + n * p.kept + c);
            acc[r / 2][j][r % 2 * 2] = pair.low;
            acc[r / 2][j][r % 2 * 2 + 1] = pair.high;
          }
        }
        finish(tile);
      }
    } else {
      // Multiply again.
      const auto load = [&](int tile, int step, int stage) {
        unsigned char* to = smem + stage * Plan::kStageBytes;
        const int64_t d = int64_t(step) * kDepth;
        load_operand<LayoutX, kThreads>(x, (first_tile + tile) * GradientTile::kRows, d, to);
        load_operand<LayoutW, kThreads>(weight, first_class, d, to + LayoutX::kBytes);
      };
      const auto multiply = [&](int, int stage) {
        const unsigned char* x_smem = smem + stage * Plan::kStageBytes;
        multiply_stage<kMath, GradientTile, LayoutX, LayoutW>(x_smem, x_smem + LayoutX::kBytes,
                                                              lane, acc);
      };
      const int steps = int((head.D + kDepth - 1) / kDepth);
      pipeline<kPipeline>(tiles, steps, load, [](int) {}, multiply, finish);
    }

    // Add up the columns: lanes, then warps in order.
#pragma unroll
    for (int j = 0; j < GradientTile::kFragsCol; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const T dot = group_sum(col_dot[j][e]), bias = group_sum(col_bias[j][e]),
                kappa = group_sum(col_kappa[j][e]);
        if (lane.group != 0) continue;
        const int col = lane.col<GradientTile>(j) + e;
        tail.col_sums[lane.warp_row][0][col] = dot;
        tail.col_sums[lane.warp_row][1][col] = bias;
        tail.col_sums[lane.warp_row][2][col] = kappa;
      }
    __syncthreads();
    double total_kappa = 0;
    for (int i = threadIdx.x; i < 3 * kClasses; i += kThreads) {
      const int which = i / kClasses, col = i % kClasses;
      T sum = 0;
      for (int w = 0; w < GradientTile::kWarpsRow; ++w) sum += tail.col_sums[w][which][col];
      p.col_sums[(slot * 3 + which) * p.chunk + first_column + col] = sum;
      if (which == 2) total_kappa += sum;
    }
    const double block_scale = block_sum(double(total_scale), tail.sums);
    total_kappa = block_sum(total_kappa, tail.sums) * double(scale);
    if (first && threadIdx.x == 0) {
      double* totals = p.totals + 2 * (blockIdx.x * groups + (p.fused ? 0 : blockIdx.y));
      totals[0] = p.chunk_begin == 0 ? block_scale : totals[0] + block_scale;
      totals[1] = p.chunk_begin == 0 ? total_kappa : totals[1] + total_kappa;
    }
    __syncthreads();
  }
  if (!p.make_weight) return;

  // Finish the column sums: the projection's factor, and the gradients of bias and kappa.
  const int64_t first_slot = p.fused ? slot : 0, slots = p.fused ? 1 : p.row_groups;
  const bool per_class_kappa = p.out.kappa.data && head.kappa.stride != 0;
  for (int i = threadIdx.x; i < kClasses; i += kThreads) {
    const int64_t c = first_class + i;
    T sums[3] = {};
    for (int which = 0; which < 3; ++which)
      for (int64_t s = first_slot; s < first_slot + slots; ++s)
        sums[which] += p.col_sums[(s * 3 + which) * p.chunk + first_column + i];
    const T rnorm = c < head.C ? p.saved[p.layout.weight_rnorm + c] : T(0);
    tail.gain[i] = p.gain[1] * (inner_rnorm(rnorm, p.float16) == rnorm ? T(1) : rnorm);
    tail.projection[i] = projection(sums[0], rnorm);
    if (blockIdx.y != 0 || c >= head.C) continue;
    const T scale = Scale<T>::of(head).value;
    if (p.out.bias.data) store_at(p.out.bias, c, scale * sums[1]);
    if (per_class_kappa) store_at(p.out.kappa, c, scale * sums[2]);
  }
  if (!p.out.weight.data) return;

  // Multiply the gradient tile by the features.
  const Lane lane = Lane::of<WeightTile>();
  const auto tile_of = Operand<X>::of(grad, p.chunk, 1, head.N, p.chunk);
  const int64_t all_tiles = (head.D + WeightTile::kCols - 1) / WeightTile::kCols;
  const int64_t per_split = (all_tiles + p.feature_splits - 1) / p.feature_splits;
  const int64_t first_tile = blockIdx.y * per_split, left = all_tiles - first_tile;
  const int tiles = int(left < per_split ? left : per_split);
  T acc[WeightTile::kFragsRow][WeightTile::kFragsCol][4];
  clear(acc);
  const auto load = [&](int tile, int step, int stage) {
    unsigned char* to = smem + stage * Plan::kStageBytes;
    const int64_t n = int64_t(step) * kDepth, d = (first_tile + tile) * WeightTile::kCols;
    if (!p.resident) load_operand<LayoutG, kThreads>(tile_of, n, first_column, to);
    load_operand<LayoutXt, kThreads>(x, n, d, to + LayoutG::kBytes);
  };
  const auto multiply = [&](int step, int stage) {
    const unsigned char* g_smem = smem + stage * Plan::kStageBytes;
    const unsigned char* x_smem = g_smem + LayoutG::kBytes;
    if (p.resident) g_smem = grad_smem + step * kDepth * LayoutG::kLineBytes;
    multiply_stage<kMath, WeightTile, LayoutG, LayoutXt>(g_smem, x_smem, lane, acc);
  };
  const auto finish = [&](int tile) {
    const int64_t first_feature = (first_tile + tile) * WeightTile::kCols;
#pragma unroll
    for (int r = 0; r < 2 * WeightTile::kFragsRow; ++r) {
      const int row = lane.row<WeightTile>(r / 2, r % 2);
      const int64_t c = first_class + row;
      if (c >= head.C) continue;
      const T gain = tail.gain[row], factor = tail.projection[row];
#pragma unroll
      for (int j = 0; j < WeightTile::kFragsCol; ++j) {
        const int64_t d = first_feature + lane.col<WeightTile>(j);
        const W* from = weight.data + c * weight.line_stride + d * weight.element_stride;
        const bool aligned = head.D % 2 == 0;
        Pair<W> w{};
        if (weight.vectors && aligned && d < head.D) {
          w = load_as<Pair<W>>(from);
        } else {
          if (d < head.D) w.low = from[0];
          if (d + 1 < head.D) w.high = from[weight.element_stride];
        }
        const T value[2] = {gain * acc[r / 2][j][r % 2 * 2] - factor * to_number<T>(w.low),
                            gain * acc[r / 2][j][r % 2 * 2 + 1] - factor * to_number<T>(w.high)};
        if (d < head.D) store_pair_at(p.out.weight, c * head.D + d, value[0], value[1], aligned);
        if (!aligned && d + 1 < head.D) store_at(p.out.weight, c * head.D + d + 1, value[1]);
      }
    }
    clear(acc);
  };
  if (tiles > 0)
    pipeline<kPipeline>(
        tiles, int((head.N + kDepth - 1) / kDepth), load, [](int) {}, multiply, finish);
}

template <Math kMath, class W, class Shape>
struct InputGradientPlan {
  using X = typename MathTraits<kMath>::X;
  using LayoutG = OperandTile<X, Shape::kRows, kMath, false>;
  using LayoutW = OperandTile<W, Shape::kCols, kMath, true>;
  static constexpr int kStageBytes = LayoutG::kBytes + LayoutW::kBytes;
  static constexpr int kBytes = kStages<kMath, W> * kStageBytes;
};

// The chunk's gradient tile times its weights, one partial sum for each run of classes.
template <Math kMath, class W, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    input_gradient(const __grid_constant__ BackwardParams<typename MathTraits<kMath>::Acc> p) {
  using Plan = InputGradientPlan<kMath, W, Shape>;
  using X = typename Plan::X;
  using T = typename MathTraits<kMath>::Acc;
  using LayoutG = typename Plan::LayoutG;
  using LayoutW = typename Plan::LayoutW;
  constexpr int kDepth = kTileD<kMath>;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  const CudaHead& head = p.head;
  const Lane lane = Lane::of<Shape>();
  const auto grad = Operand<X>::of(p.grad, p.chunk, 1, head.N, p.chunk);
  const auto weight = Operand<W>::of(head.weight.data, head.weight.row_stride,
                                     head.weight.col_stride, head.C, head.D);
  const int64_t first_row = int64_t(blockIdx.x) * Shape::kRows;
  const int64_t first_feature = int64_t(blockIdx.y) * Shape::kCols;
  const int all_steps = int((p.chunk_count + kDepth - 1) / kDepth);
  const int per_split = (all_steps + int(p.input_splits) - 1) / int(p.input_splits);
  const int first_step = int(blockIdx.z) * per_split, left = all_steps - first_step;
  const int steps = left < per_split ? left : per_split;

  T acc[Shape::kFragsRow][Shape::kFragsCol][4];
  clear(acc);
  const auto load = [&](int, int step, int stage) {
    unsigned char* to = smem + stage * Plan::kStageBytes;
    const int c = (first_step + step) * kDepth;
    load_operand<LayoutG, Shape::kThreads>(grad, first_row, c, to);
    load_operand<LayoutW, Shape::kThreads>(weight, p.chunk_begin + c, first_feature,
                                           to + LayoutG::kBytes);
  };
  const auto multiply = [&](int, int stage) {
    const unsigned char* g_smem = smem + stage * Plan::kStageBytes;
    multiply_stage<kMath, Shape, LayoutG, LayoutW>(g_smem, g_smem + LayoutG::kBytes, lane, acc);
  };
  const auto finish = [&](int) {
    T* dx = p.dx + blockIdx.z * head.N * head.D;
    const bool add = p.chunk_begin > 0, aligned = head.D % 2 == 0;
#pragma unroll
    for (int r = 0; r < 2 * Shape::kFragsRow; ++r) {
      const int64_t n = first_row + lane.row<Shape>(r / 2, r % 2);
      if (n >= head.N) continue;
#pragma unroll
      for (int j = 0; j < Shape::kFragsCol; ++j) {
        const int64_t d = first_feature + lane.col<Shape>(j);
        if (d >= head.D) continue;
        T* to = dx + n * head.D + d;
        Pair<T> pair{acc[r / 2][j][r % 2 * 2], acc[r / 2][j][r % 2 * 2 + 1]};
        if (aligned) {
          const Pair<T> old = add ? load_as<Pair<T>>(to) : Pair<T>{};
          store_as(to, Pair<T>{old.low + pair.low, old.high + pair.high});
        } else {
          to[0] = add ? to[0] + pair.low : pair.low;
          if (d + 1 < head.D) to[1] = add ? to[1] + pair.high : pair.high;
        }
      }
    }
  };
  if (steps > 0) {
    pipeline<kStages<kMath, W>>(1, steps, load, [](int) {}, multiply, finish);
  } else if (p.chunk_begin == 0) {
    finish(0);
  }
}

constexpr int kFinishThreads = 512;

// Rows of a block of finish_gradient: several share the sectors of row_dot, as long as a thread has
// but four features and there is a block for every multiprocessor.
TVMF_HOST_DEVICE int rows_to_finish(int64_t N, int64_t D) {
  int rows = 1;
  while (rows < 8 && 2 * rows * D <= 4 * kFinishThreads && 2 * rows * 128 <= N) rows *= 2;
  return rows;
}

template <class T>
__device__ __forceinline__ T element_at(const MatrixRef& matrix, int64_t row, int64_t col) {
  const VectorRef line{matrix.data, matrix.dtype, 1, 0};
  return value_at<T>(line, row * matrix.row_stride + col * matrix.col_stride);
}

// Four neighbours of a row of x, which lie side by side and aligned.
template <class T>
__device__ __forceinline__ void elements_at(const MatrixRef& matrix, int64_t at, T (&out)[4]) {
  const auto load = [&](const auto* data) {
    struct Run {
      std::remove_cvref_t<decltype(*data)> element[4];
    };
    const auto run = load_as<Run>(data + at);
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = to_number<T>(run.element[k]);
  };
  switch (matrix.dtype) {
    case DType::kFloat16: load(static_cast<const f16*>(matrix.data)); break;
    case DType::kBFloat16: load(static_cast<const bf16*>(matrix.data)); break;
    case DType::kFloat32: load(static_cast<const float*>(matrix.data)); break;
    default:
      if constexpr (sizeof(T) == 8) load(static_cast<const double*>(matrix.data));
  }
}

template <class T>
__device__ __forceinline__ void store_four_at(const GradientRef& to, int64_t at,
                                              const T (&values)[4]) {
  const auto store = [&](auto* data) {
    using Y = std::remove_cvref_t<decltype(*data)>;
    struct {
      Pair<Y> pair[2];
    } run{round_pair<Y>(values[0], values[1]), round_pair<Y>(values[2], values[3])};
    store_as(data + at, run);
  };
  switch (to.dtype) {
    case DType::kFloat16: store(static_cast<f16*>(to.data)); break;
    case DType::kBFloat16: store(static_cast<bf16*>(to.data)); break;
    case DType::kFloat32: store(static_cast<float*>(to.data)); break;
    default:
      store_pair_at(to, at, values[0], values[1], true);
      store_pair_at(to, at + 2, values[2], values[3], true);
  }
}

// A block some rows: adds up the runs of classes in order, and projects. The last block has the
// totals. It is all latency and bytes: of up to four slots and eight runs (float64: four) the loads
// are under way together, before the sum over slots is made.
template <class T>
__global__ void __launch_bounds__(kFinishThreads, sizeof(T) == 4 ? 2 : 1)
    finish_gradient(const __grid_constant__ BackwardParams<T> p) {
  constexpr int kWarps = kFinishThreads / kWarp, kSlots = 4, kRuns = 32 / int(sizeof(T));
  const CudaHead& head = p.head;
  if (blockIdx.x == gridDim.x - 1) {
    double sums[2] = {};
    for (int64_t i = threadIdx.x; i < p.total_count; i += kFinishThreads) {
      const auto pair = load_as<Pair<double>>(p.totals + 2 * i);
      sums[0] += pair.low;
      sums[1] += pair.high;
    }
    block_sums(sums, static_cast<double*>(shared_memory()));
    if (threadIdx.x != 0) return;
    if (p.out.scale.data) store_at(p.out.scale, 0, T(sums[0] * Scale<T>::of(head).derivative));
    if (p.out.kappa.data && head.kappa.stride == 0) store_at(p.out.kappa, 0, T(sums[1]));
    return;
  }

  T* dots_smem = static_cast<T*>(shared_memory());  // [rows, kWarps]
  const int rows = rows_to_finish(head.N, head.D), lane = threadIdx.x % kWarp;
  const int64_t first_row = int64_t(blockIdx.x) * rows, left = head.N - first_row;
  const T* dot_column = p.row_dot + first_row + threadIdx.x % rows;
  const int64_t slots = threadIdx.x % rows < left ? p.dot_slots : 0;
  const auto load_slots = [&](int64_t first, T(&dots)[kSlots]) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const int64_t slot = first + k * (kFinishThreads / rows);
      dots[k] = slot < slots ? dot_column[slot * head.N] : T(0);
    }
  };
  // Everything but the loads is done once their first ones are under way.
  const auto project = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    struct Run {
      T element[kWidth];
    };
    const int units = int((head.D + kWidth - 1) / kWidth);
    const int64_t count = (left < rows ? left : rows) * units;
    T sum[kWidth], x[kWidth], rnorm = 0, gain = 0;
    int row = 0;
    int64_t d = 0;
    const auto gather = [&](int64_t unit) {
      row = rows == 1 ? 0 : int(unit) / units;
      d = (unit - int64_t(row) * units) * kWidth;
      const int64_t n = first_row + row;
      const auto load_runs = [&](int64_t first, Run(&runs)[kRuns]) {
#pragma unroll
        for (int k = 0; k < kRuns; ++k)
          runs[k] = first + k < p.input_splits
                        ? load_as<Run>(p.dx + ((first + k) * head.N + n) * head.D + d)
                        : Run{};
      };
      Run runs[kRuns];
      load_runs(0, runs);
      rnorm = p.saved[p.layout.x_rnorm + n];
      gain = p.gain[1];
      if constexpr (kWidth == 4)
        elements_at(head.x, n * head.x.row_stride + d, x);
      else
        x[0] = element_at<T>(head.x, n, d);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] = 0;
      for (int64_t s = 0;;) {
#pragma unroll
        for (int k = 0; k < kRuns; ++k)
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sum[i] += runs[k].element[i];
        s += kRuns;
        if (s >= p.input_splits) break;
        load_runs(s, runs);
      }
    };
    T dots[kSlots];
    int64_t slot = int(threadIdx.x) / rows, unit = threadIdx.x;
    load_slots(slot, dots);
    if (unit < count) gather(unit);

    T dot = 0;
    for (;;) {
#pragma unroll
      for (int k = 0; k < kSlots; ++k) dot += dots[k];
      slot += kSlots * (kFinishThreads / rows);
      if (slot >= slots) break;
      load_slots(slot, dots);
    }
    for (int mask = rows; mask < kWarp; mask *= 2) dot += __shfl_xor_sync(0xffffffff, dot, mask);
    if (lane < rows) dots_smem[lane * kWarps + int(threadIdx.x) / kWarp] = dot;
    __syncthreads();

    while (unit < count) {
      dot = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) dot += dots_smem[row * kWarps + warp];
      const T factor = projection(dot, rnorm);
      const T all = gain * (inner_rnorm(rnorm, p.float16) == rnorm ? T(1) : rnorm);
      const int64_t at = (first_row + row) * head.D + d;
      if constexpr (kWidth == 4) {
        T values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = all * sum[i] - factor * x[i];
        store_four_at(p.out.x, at, values);
      } else {
        store_at(p.out.x, at, all * sum[0] - factor * x[0]);
      }
      unit += kFinishThreads;
      if (unit < count) gather(unit);
    }
  };
  const bool fours = head.D % 4 == 0 && head.x.col_stride == 1 && head.x.row_stride % 4 == 0 &&
                     reinterpret_cast<uintptr_t>(head.x.data) % 16 == 0;
  if (fours)
    project(std::integral_constant<int, 4>{});
  else
    project(std::integral_constant<int, 1>{});
}

template <Math kMath, class W, class Shape, class T>
cudaError_t launch_input(const BackwardParams<T>& p, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(p.head.N, Shape::kRows)),
                  unsigned(ceil_div(p.head.D, Shape::kCols)), unsigned(p.input_splits));
  return launch_kernel(input_gradient<kMath, W, Shape>, grid, Shape::kThreads,
                       InputGradientPlan<kMath, W, Shape>::kBytes, stream, p);
}

template <Math kMath, class W>
cudaError_t backward(const CudaHead& head, const LossOptions& options, const CudaPlan& plan,
                     const CudaUpstream& upstream, const CudaGradients& out, const void* saved,
                     void* workspace, cudaStream_t stream) {
  using T = typename MathTraits<kMath>::Acc;
  constexpr int64_t kClasses = GradientTile::kCols;
  const BackwardWorkspace at(plan);
  unsigned char* base = static_cast<unsigned char*>(workspace);
  const auto in = [&](int64_t offset) { return reinterpret_cast<T*>(base + offset); };
  BackwardParams<T> p{
      .head = head,
      .options = options,
      .upstream = upstream,
      .out = out,
      .layout = SavedLayout(head.N, head.C, plan.problem.kept),
      .saved = static_cast<const T*>(saved),
      .kept = plan.problem.kept,
      .with_sum = plan.problem.with_sum,
      .float16 = kMath == Math::kF16,
      .chunk = plan.chunk,
      .chunk_begin = 0,
      .chunk_count = 0,
      .make_gradient = false,
      .make_weight = false,
      .fused = plan.latency,
      .resident = plan.resident,
      .row_groups = plan.row_groups,
      .feature_splits = plan.feature_splits,
      .input_splits = plan.input_splits,
      .total_count = total_count(plan),
      .rows = reinterpret_cast<GradientRow<T>*>(base + at.rows),
      .gain = in(at.gain),
      .grad = base + at.grad,
      .row_dot = in(at.row_dot),
      .col_sums = in(at.col_sums),
      .dx = in(at.dx),
      .totals = reinterpret_cast<double*>(base + at.totals),
      .dot_slots = dot_slots(plan),
      .arranged = {plan.hopper.rows, plan.hopper.columns,
                   plan.hopper.used ? base + at.arranged : nullptr, base + at.arranged_columns}};
  const bool class_outputs = out.weight.data || out.bias.data || out.kappa.data;
  const int64_t arranging = ceil_div(p.arranged.chunks(), kPrepareThreads);
  cudaError_t error = launch_kernel(prepare_gradient<T>, dim3(unsigned(1 + arranging)),
                                    kPrepareThreads, 3 * kPrepareThreads / kWarp * 8, stream, p);
  if constexpr (sizeof(W) > sizeof(typename MathTraits<kMath>::X))
    if (plan.hopper.used && error == cudaSuccess)
      error = sm90::class_gradients(p, plan, base + at.weight, stream);
  for (int64_t begin = plan.hopper.used ? head.C : 0; begin < head.C && error == cudaSuccess;
       begin += plan.chunk) {
    p.chunk_begin = begin;
    p.chunk_count = std::min(plan.chunk, head.C - begin);
    const unsigned tiles = unsigned(ceil_div(p.chunk_count, kClasses));
    const auto launch_classes = [&](bool gradient, bool weight, int64_t blocks) {
      p.make_gradient = gradient;
      p.make_weight = weight;
      return launch_kernel(class_gradient<kMath, W>, dim3(tiles, unsigned(blocks)),
                           GradientTile::kThreads, ClassGradientPlan<kMath, W>::shared_bytes(plan),
                           stream, p);
    };
    if (plan.latency) {
      error = launch_classes(true, class_outputs, class_outputs ? plan.feature_splits : 1);
    } else {
      error = launch_classes(true, false, plan.row_groups);
      if (error == cudaSuccess && class_outputs)
        error = launch_classes(false, true, plan.feature_splits);
    }
    if (error != cudaSuccess || !out.x.data) continue;
    if constexpr (kTensorCores<kMath>) {
      error = plan.input_tile == LargeTile::kRows ? launch_input<kMath, W, LargeTile>(p, stream)
                                                  : launch_input<kMath, W, SmallTile>(p, stream);
    } else {
      error = launch_input<kMath, W, SmallTile>(p, stream);
    }
  }
  const bool scalars = out.scale.data || (out.kappa.data && head.kappa.stride == 0);
  if (error != cudaSuccess || !(out.x.data || scalars)) return error;
  const int64_t row_blocks = out.x.data ? ceil_div(head.N, rows_to_finish(head.N, head.D)) : 0;
  return launch_kernel(finish_gradient<T>, dim3(unsigned(row_blocks + 1)), kFinishThreads,
                       8 * kFinishThreads / kWarp * int(sizeof(T)), stream, p);
}

}  // namespace

cudaError_t cuda_backward(const CudaHead& head, const LossOptions& options, const CudaPlan& plan,
                          const CudaUpstream& upstream, const CudaGradients& out, const void* saved,
                          void* workspace, cudaStream_t stream) {
  return with_math(plan, [&](auto math, auto weight) {
    return backward<decltype(math)::value, decltype(weight)>(head, options, plan, upstream, out,
                                                             saved, workspace, stream);
  });
}

}  // namespace tvmf
