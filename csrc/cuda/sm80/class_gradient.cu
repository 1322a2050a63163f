// The kernel that makes the gradient tiles of a chunk of classes and the gradients of these
// classes.
#include "cuda/sm80/gradient_tile.cuh"
#include "cuda/sm80/weight_gradient.cuh"

namespace tvmf::sm80 {
namespace {

// Types of one kernel and the layout of its shared memory.
template <Math kMath_, class W_>
struct ClassGradient {
  static constexpr Math kMath = kMath_;
  using W = W_;
  using X = typename MathTraits<kMath>::X;
  using T = typename MathTraits<kMath>::Acc;
  using Params = ClassGradientParams<T>;
  using GradientTile = sm80::GradientTile<kMath>;
  using WeightTile = sm80::WeightTile<kMath>;
  static_assert(GradientTile::kThreads == WeightTile::kThreads, "one block makes both");
  static constexpr int kClasses = GradientTile::kCols, kThreads = GradientTile::kThreads;
  static constexpr int kDepth = kTileD<kMath>;

  // Cosines: rows x classes.
  using LayoutX = OperandTile<X, GradientTile::kRows, kMath, false>;
  using LayoutW = OperandTile<W, GradientTile::kCols, kMath, false>;
  // Weight gradient: classes x features, summed over rows.
  using LayoutG = OperandTile<X, WeightTile::kRows, kMath, true>;
  using LayoutXt = OperandTile<X, WeightTile::kCols, kMath, true>;
  using RoundedW = OperandTile<X, GradientTile::kCols, kMath, false>;
  static constexpr int kWeightStages = kTensorCores<kMath> ? 3 : kStages<kMath, X>;
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
  static_assert(kBytes == gradient_shared_bytes(kMath, kRounded<kMath, W>),
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

// A block has 64 classes. It makes the gradient tiles of its rows, or the weight gradient from
// those of all rows, or both in turn.
template <Math kMath, class W>
__global__ void __launch_bounds__(GradientTile<kMath>::kThreads, kMath == Math::kF64 ? 1 : 2)
    class_gradient(const __grid_constant__ ClassGradientParams<typename MathTraits<kMath>::Acc> p) {
  using K = ClassGradient<kMath, W>;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  if (p.work.gradient) make_gradient_tiles<K>(p, smem);
  if (!p.work.weight) return;
  finish_columns<K>(p, smem);
  if (p.out.weight.data) make_weight_gradient<K>(p, smem);
}

}  // namespace

template <class T>
cudaError_t launch_class_gradient(const ClassGradientParams<T>& p, const Plan& plan,
                                  cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.chunk.count, kClassTile);
  const int64_t sharers = p.work.weight ? p.work.feature_splits : p.work.row_groups;
  const dim3 grid{unsigned(tiles), unsigned(sharers)};
  return with_math_of<T>(plan.math, p.head.weight.dtype, [&](auto math, auto weight) {
    constexpr Math kMath = decltype(math)::value;
    using W = decltype(weight);
    return launch_kernel(class_gradient<kMath, W>, grid, GradientTile<kMath>::kThreads,
                         ClassGradient<kMath, W>::shared_bytes(p.head.N, plan.resident), stream, p);
  });
}
template cudaError_t launch_class_gradient(const ClassGradientParams<float>&, const Plan&,
                                           cudaStream_t);
template cudaError_t launch_class_gradient(const ClassGradientParams<double>&, const Plan&,
                                           cudaStream_t);

}  // namespace tvmf::sm80
