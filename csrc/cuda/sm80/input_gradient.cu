// The product for the gradient of the features.
#include "cuda/device.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/mainloop.cuh"

namespace tvmf::sm80 {
namespace {

template <Math kMath, class W, class Shape>
struct InputGradientLayout {
  using X = typename MathTraits<kMath>::X;
  using LayoutG = OperandTile<X, Shape::kRows, kMath, false>;
  using LayoutW = OperandTile<W, Shape::kCols, kMath, true>;
  using RoundedW = OperandTile<X, Shape::kCols, kMath, true>;
  static constexpr int kStageBytes =
      LayoutG::kBytes + LayoutW::kBytes + (kRounded<kMath, W> ? RoundedW::kBytes : 0);
  static constexpr int kBytes = kStages<kMath, W> * kStageBytes;
};

// The chunk's gradient times its weights: one partial sum of dx for each run of classes.
template <Math kMath, class W, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    input_gradient(const __grid_constant__ InputGradientParams<typename MathTraits<kMath>::Acc> p) {
  using Smem = InputGradientLayout<kMath, W, Shape>;
  using X = typename Smem::X;
  using T = typename MathTraits<kMath>::Acc;
  using LayoutG = typename Smem::LayoutG;
  using LayoutW = typename Smem::LayoutW;
  constexpr int kDepth = kTileD<kMath>;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  const Lane lane = Lane::of<Shape>();
  const auto grad = Operand<X>::of(p.gradient.data, p.chunk.size, 1, p.N, p.chunk.size);
  const auto weight = Operand<W>::of(p.weight, p.chunk.count, p.D);
  const int64_t first_row = int64_t(blockIdx.x) * Shape::kRows;
  const int64_t first_feature = int64_t(blockIdx.y) * Shape::kCols;
  const int all_steps = int((p.chunk.count + kDepth - 1) / kDepth);
  const int per_split = (all_steps + int(p.dx.count) - 1) / int(p.dx.count);
  const int first_step = int(blockIdx.z) * per_split, left = all_steps - first_step;
  const int steps = left < per_split ? left : per_split;

  T acc[Shape::kFragsRow][Shape::kFragsCol][4];
  clear(acc);
  TileLoader<LayoutG, Shape::kThreads> load_g(grad);
  TileLoader<LayoutW, Shape::kThreads> load_w(weight);
  const auto load_a = [&](int, int step, int stage) {
    load_g.load(first_row, int64_t(first_step + step) * kDepth, step == 0,
                smem + stage * Smem::kStageBytes);
  };
  const auto load_b = [&](int, int step, int stage) {
    load_w.load(int64_t(first_step + step) * kDepth, first_feature, step == 0,
                smem + stage * Smem::kStageBytes + LayoutG::kBytes);
  };
  const auto round = [&](int, int, int stage) {
    unsigned char* w_smem = smem + stage * Smem::kStageBytes + LayoutG::kBytes;
    round_columns<kMath, LayoutW, typename Smem::RoundedW, Shape::kThreads>(
        w_smem, w_smem + LayoutW::kBytes);
  };
  const auto multiply = [&](int, int stage) {
    const unsigned char* g_smem = smem + stage * Smem::kStageBytes;
    const unsigned char* w_smem = g_smem + LayoutG::kBytes;
    if constexpr (kRounded<kMath, W>)
      multiply_stage<kMath, Shape, LayoutG, typename Smem::RoundedW>(
          g_smem, w_smem + LayoutW::kBytes, lane, acc);
    else
      multiply_stage<kMath, Shape, LayoutG, LayoutW>(g_smem, w_smem, lane, acc);
  };
  const auto finish = [&](int) {
    T* dx = p.dx.data + blockIdx.z * p.N * p.D;
    const bool add = p.chunk.begin > 0, aligned = p.D % 2 == 0;
#pragma unroll
    for (int r = 0; r < 2 * Shape::kFragsRow; ++r) {
      const int64_t n = first_row + lane.row<Shape>(r / 2, r % 2);
      if (n >= p.N) continue;
#pragma unroll
      for (int j = 0; j < Shape::kFragsCol; ++j) {
        const int64_t d = first_feature + lane.col<Shape>(j);
        if (d >= p.D) continue;
        T* to = dx + n * p.D + d;
        Pair<T> pair{acc[r / 2][j][r % 2 * 2], acc[r / 2][j][r % 2 * 2 + 1]};
        if (aligned) {
          const Pair<T> old = add ? load_as<Pair<T>>(to) : Pair<T>{};
          store_as(to, Pair<T>{old.low + pair.low, old.high + pair.high});
        } else {
          to[0] = add ? to[0] + pair.low : pair.low;
          if (d + 1 < p.D) to[1] = add ? to[1] + pair.high : pair.high;
        }
      }
    }
  };
  if (steps > 0) {
    if constexpr (kRounded<kMath, W>)
      pipeline<kStages<kMath, W>>(1, steps, load_a, load_b, Nothing{}, round, multiply, finish);
    else
      pipeline<kStages<kMath, W>>(1, steps, load_a, load_b, Nothing{}, Nothing{}, multiply, finish);
  } else if (p.chunk.begin == 0) {
    finish(0);
  }
}

}  // namespace

template <class T>
cudaError_t launch_input_gradient(const InputGradientParams<T>& p, const Plan& plan,
                                  cudaStream_t stream) {
  return with_math_of<T>(plan.math, p.weight.dtype, [&](auto math, auto weight) {
    constexpr Math kMath = decltype(math)::value;
    using W = std::conditional_t<kMath == Math::kF16, f16, decltype(weight)>;
    return with_tile<kMath>(plan.input_tile, [&](auto shape) {
      using Shape = decltype(shape);
      const dim3 grid(unsigned(ceil_div(p.N, Shape::kRows)), unsigned(ceil_div(p.D, Shape::kCols)),
                      unsigned(p.dx.count));
      return launch_kernel(input_gradient<kMath, W, Shape>, grid, Shape::kThreads,
                           InputGradientLayout<kMath, W, Shape>::kBytes, stream, p);
    });
  });
}
template cudaError_t launch_input_gradient(const InputGradientParams<float>&, const Plan&,
                                           cudaStream_t);
template cudaError_t launch_input_gradient(const InputGradientParams<double>&, const Plan&,
                                           cudaStream_t);

}  // namespace tvmf::sm80
