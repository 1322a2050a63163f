// The kernel that makes the gradient tiles of a chunk of classes and the gradients of these
// classes.
#include "cuda/sm80/gradient_tile.cuh"
#include "cuda/sm80/weight_gradient.cuh"

namespace tvmf::sm80 {
namespace {

// Types of one kernel and the layout of its shared memory.
template <Math kMath_, class W_, int kClasses_>
struct ClassGradient {
  static constexpr Math kMath = kMath_;
  using W = W_;
  using X = typename MathTraits<kMath>::X;
  using T = typename MathTraits<kMath>::Acc;
  using Params = ClassGradientParams<T>;
  static constexpr int kClasses = kClasses_;
  using GradientTile = sm80::GradientTile<kMath, kClasses>;
  using WeightTile = sm80::WeightTile<kMath, kClasses>;
  static_assert(GradientTile::kThreads == WeightTile::kThreads, "one block makes both");
  static constexpr int kThreads = GradientTile::kThreads;
  // Whether this is an instance of the latency path, whose launches can make both parts.
  static constexpr bool kLatency = kClasses == kSmallTile;
  static constexpr int kDepth = kTileD<kMath>;

  // Cosines: rows x classes.
  using LayoutX = OperandTile<X, GradientTile::kRows, kMath, false>;
  using LayoutW = OperandTile<W, GradientTile::kCols, kMath, false>;
  // Weight gradient: classes x features, summed over rows.
  using LayoutG = OperandTile<X, WeightTile::kRows, kMath, true>;
  using LayoutXt = OperandTile<X, WeightTile::kCols, kMath, true>;
  using RoundedW = OperandTile<X, GradientTile::kCols, kMath, false>;
  static constexpr int kWeightStages = kTensorCores<kMath> && kLatency ? 3 : kStages<kMath, X>;
  static constexpr int kCosineStages = kRounded<kMath, W> ? kStages<kMath, W> : kWeightStages;
  static constexpr int kCosineStage =
      LayoutX::kBytes + LayoutW::kBytes + (kRounded<kMath, W> ? RoundedW::kBytes : 0);
  static constexpr int kWeightStage = LayoutG::kBytes + LayoutXt::kBytes;
  static constexpr int kCosineBytes = kCosineStages * kCosineStage;
  static constexpr int kWeightBytes = kWeightStages * kWeightStage;
  static constexpr int kStagesBytes = kCosineBytes > kWeightBytes ? kCosineBytes : kWeightBytes;

  struct Tail {
    ClassTile<T, kClasses> classes;
    T column_sums[GradientTile::kWarpsRow][3][kClasses];
    T factor[kClasses], projection[kClasses];  // of the weight gradient
    double sums[kThreads / kWarp];
  };
  // Stages, tail, and then the gradient tile of all rows where it is resident.
  static constexpr int kBytes = kStagesBytes + int(sizeof(Tail));
  static_assert(kBytes == (kLatency ? gradient_shared_bytes(kMath, kRounded<kMath, W>)
                                    : kLargeGradientBytes),
                "the plan counts on it");
  static int shared_bytes(int64_t N, bool resident) {
    return kBytes + (resident ? int(round_up(N, GradientTile::kRows) * LayoutG::kLineBytes) : 0);
  }
  // The block's first class, counted in the chunk.
  static __device__ __forceinline__ int64_t first_column() {
    return int64_t(blockIdx.x) * kClasses;
  }
  static __device__ __forceinline__ Tail& tail(unsigned char* smem) {
    return *reinterpret_cast<Tail*>(smem + kStagesBytes);
  }
};

// A block has kClasses. It makes the gradient tiles of its rows, or the weight gradient from those
// of all rows, or both in turn.
template <Math kMath, class W, int kClasses>
__global__ void __launch_bounds__(GradientTile<kMath, kClasses>::kThreads,
                                  kMath == Math::kF64 ? 1 : 2)
    class_gradient(const __grid_constant__ ClassGradientParams<typename MathTraits<kMath>::Acc> p) {
  using K = ClassGradient<kMath, W, kClasses>;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  if (p.work.gradient) make_gradient_tiles<K>(p, smem);
  if (K::kLatency ? !p.work.weight : p.work.gradient) return;
  finish_columns<K>(p, smem);
  if (p.out.weight.data) make_weight_gradient<K>(p, smem);
}

}  // namespace

template <class T>
cudaError_t launch_class_gradient(const ClassGradientParams<T>& p, const Plan& plan,
                                  cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.chunk.count, plan.class_tile);
  const int64_t sharers = p.work.weight ? p.work.feature_splits : p.work.row_groups;
  const dim3 grid{unsigned(tiles), unsigned(sharers)};
  return with_math_of<T>(plan.math, p.head.weight.dtype, [&](auto math, auto weight) {
    constexpr Math kMath = decltype(math)::value;
    using W = decltype(weight);
    const auto launch = [&](auto tile) {
      constexpr int kClasses = decltype(tile)::value;
      using K = ClassGradient<kMath, W, kClasses>;
      return launch_kernel(class_gradient<kMath, W, kClasses>, grid, K::kThreads,
                           K::shared_bytes(p.head.N, plan.resident), stream, p);
    };
    if constexpr (has_large_classes(kMath))
      if (plan.class_tile == kLargeTile) return launch(std::integral_constant<int, kLargeTile>{});
    return launch(std::integral_constant<int, kSmallTile>{});
  });
}
template cudaError_t launch_class_gradient(const ClassGradientParams<float>&, const Plan&,
                                           cudaStream_t);
template cudaError_t launch_class_gradient(const ClassGradientParams<double>&, const Plan&,
                                           cudaStream_t);

}  // namespace tvmf::sm80
