// The gradient tiles of all classes, t_nc = dL/dcosine, of products that the forward pass has kept.
// One launch does the work of prepare_gradient and gradient.
#include "cuda/rows/gradient_terms.cuh"
#include "cuda/sm90/gradient_tile.cuh"
#include "cuda/sm90/ptx.cuh"

namespace tvmf::sm90 {
namespace {

struct alignas(16) FourProducts {
  float v[4];
};
// The products of each thread's two classes with 8 rows. Those of the next tile are copied while
// the thread works on these.
using Products = FourProducts[4][kKeptThreads];

// Shared memory: two sets of products; the terms of all rows; and two tiles' sums over the rows of
// a warp, whose place the terms' own sums have before.
struct KeptShared {
  static constexpr int kSums = 3 * kKeptWarps * kWarpClasses;  // floats of a tile
  static_assert(rows::kGradientBytes <= 2 * kSums * 4);
  int rows;  // N, rounded up to 32

  static __host__ __device__ KeptShared of(int64_t N) { return {int(N + 31) / 32 * 32}; }
  __host__ __device__ int sums_at() const {
    return 2 * int(sizeof(Products)) + rows * 24 +
           target_at(rows) * int(sizeof(TargetGradient<float>));
  }
  __host__ __device__ int bytes() const { return sums_at() + 2 * kSums * 4; }

  __device__ __forceinline__ RowTerms terms(unsigned char* smem) const {
    // 16 bytes divide the size of each part.
    auto* targets = reinterpret_cast<TargetGradient<float>*>(smem + 2 * sizeof(Products));
    float* at = reinterpret_cast<float*>(targets + target_at(rows));
    return {at,
            at + rows,
            at + 2 * rows,
            at + 3 * rows,
            at + 4 * rows,
            reinterpret_cast<int*>(at + 5 * rows),
            targets};
  }
};

// Each block makes the terms of all rows, which takes a chain of loads, while the products of its
// first tile are on their way and it arranges its share of the features. A tile has all rows: a
// warp of it has 16 classes, and 32 rows at a time.
template <Math kMath, Terms kTerms>
__global__ void __launch_bounds__(kKeptThreads, 1)
    kept_gradient(const __grid_constant__ KeptGradientParams p) {
#ifdef TVMF_HOPPER
  constexpr bool kAll = kTerms == Terms::kAll;
  constexpr int kSumsOfClass = kAll ? 3 : 1;
  unsigned char* smem = static_cast<unsigned char*>(shared_memory());
  const CudaHead& head = p.rows.head;
  const int N = int(head.N), stride = int(p.gradient.stride);
  const auto layout = KeptShared::of(N);
  const RowTerms rows = layout.terms(smem);
  float* sums_smem = reinterpret_cast<float*>(smem + layout.sums_at());
  double* totals_smem = reinterpret_cast<double*>(sums_smem);

  const int lane = threadIdx.x % kWarp, group = lane / 4, quad = lane % 4;
  const int warp = threadIdx.x / kWarp, row_warps = p.tiles.row_warps;
  const int row_warp = warp % row_warps, class_warp = warp / row_warps;
  const bool active = class_warp < p.tiles.class_warps;
  const int step = row_warps * 32, first_row = row_warp * 32 + quad * 8;
  const int first_column = class_warp * kWarpClasses + group, classes = p.tiles.classes();

  // Starts to copy the products of rows from `row` on.
  const auto copy = [&](int tile, int row, Products& to) {
    const int64_t first = int64_t(tile) * classes + first_column;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t c = first + h * 8;
      const bool inside = active && tile < p.tiles.tiles && c < head.C && row < N;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = inside ? c * p.product_stride + kept_half(row, half) : 0;
        cp_async_or_zero(&to[h * 2 + half][threadIdx.x], p.product + at, inside);
      }
    }
    cp_async_commit();
  };
  auto* products = reinterpret_cast<Products*>(smem);
  int set = 0;
  copy(blockIdx.x, first_row, products[0]);

  const int64_t items = p.rows.arranged.column_items(N);
  for (int64_t i = int64_t(blockIdx.x) * kKeptThreads + threadIdx.x; i < items;
       i += int64_t(gridDim.x) * kKeptThreads)
    arrange_by_columns(head, p.rows.arranged, i);

  const float scale = Scale<float>::of(head).value;
  const float loss_scale = rows::make_gradient_rows</*kAhead=*/false>(
      p.rows, totals_smem,
      [&](int64_t n, GradientRow<float> row, const TargetGradient<float>& target) {
        row.scaled_rnorm = unit_rnorm(row.rnorm);
        rows.set(int(n), true, row, scale);
        store_as(rows.target + target_at(int(n)), target);
      });
  for (int n = threadIdx.x; n < layout.rows; n += kKeptThreads) {
    if (n < N)
      rows.scaled_rnorm[n] *= loss_scale;
    else
      rows.set(n, false, GradientRow<float>{}, scale);
  }
  __syncthreads();

  TotalSums totals;
  int buffer = 0;
  for (int tile = blockIdx.x; tile < p.tiles.tiles; tile += gridDim.x, buffer ^= 1) {
    const int64_t first = int64_t(tile) * classes + first_column;
    float finished[3][2] = {};
    if (active) {
      // The products were made of the weights themselves, but for float16's unit rows. The gradient
      // tile is made for unit rows all the same, and then multiplied by a power of two, so that a
      // weight times a power of two has the same bits.
      constexpr bool kUnitWeights = kMath == Math::kF16;
      float unit[2];
      const auto pair = PairOfClasses::of(head, first, scale, [&](int h, int64_t c) {
        const float rnorm = c < head.C ? p.rows.saved.weight_rnorm[c] : 0.0f;
        const float inner = unit_rnorm(rnorm);
        unit[h] = kUnitWeights ? 1.0f : unit_scale(rnorm);
        return Pair<float>{kUnitWeights ? inner : rnorm, inner};
      });
      PairSums sums;
      unsigned targets = 0;  // a bit for each 32 rows of the warp
      for (int row = first_row, i = 0; row - quad * 8 < N; row += step, ++i) {
        cp_async_wait<0>();
        FourProducts product[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) product[i] = products[set][i][threadIdx.x];
        set ^= 1;
        const bool last = row - quad * 8 + step >= N;
        copy(last ? tile + gridDim.x : tile, last ? first_row : row + step, products[set]);
        const unsigned found =
            groups_with_target<1>(rows.label + row - quad * 8, int(first) - group, lane);
        targets |= found << i;
        uint32_t pairs[2][4];
        gradient_rows<kMath, kTerms>(
            rows, row, int(first), found, pair,
            [&](int i, int h) { return product[h * 2 + i / 4].v[i % 4]; }, sums, totals, pairs);
        if constexpr (!kUnitWeights) {
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (uint32_t& each : pairs[h]) each = scale_bf16(each, to_bf16(unit[h]));
        }
        if (row < stride)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (pair.inside[h])
              store_gradients(p.gradient.data + (first + h * 8) * stride + row, pairs[h]);
      }
      finish_sums<kTerms>(pair, sums, unit, totals, finished);
      if constexpr (kAll) {
        for (int row = first_row; targets; row += step, targets >>= 1)
          if (targets & 1) add_targets(rows, row, int(first), scale, finished);
        totals.kappa += finished[2][0] + finished[2][1];
      }
    }

    // Add up the sums of the warps that share classes, in order. The two buffers take turns, so
    // that one barrier a tile is enough.
    float* to = sums_smem + buffer * KeptShared::kSums;
#pragma unroll
    for (int which = 0; which < kSumsOfClass; ++which)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = quad_sum(finished[which][h]);
        if (active && quad == 0)
          to[(row_warp * kSumsOfClass + which) * classes + first_column + h * 8] = sum;
      }
    __syncthreads();
    for (int i = threadIdx.x; i < kSumsOfClass * classes; i += kKeptThreads) {
      const int which = i / classes, column = i % classes;
      const int64_t c = int64_t(tile) * classes + column;
      if (c >= head.C) continue;
      float sum = 0;
      for (int w = 0; w < row_warps; ++w) sum += to[w * kSumsOfClass * classes + i];
      p.sums.columns[which * p.column_stride + c] = sum;
    }
  }

  double of_block[2] = {double(totals.scale), double(totals.kappa)};
  block_sums(of_block, totals_smem);
  if (threadIdx.x == 0) {
    p.sums.totals[2 * blockIdx.x] = of_block[0] / (double(kLog2E) * double(scale));
    p.sums.totals[2 * blockIdx.x + 1] = of_block[1];
  }
#else
  no_such_instructions();
#endif
}

}  // namespace

cudaError_t launch_kept_gradient(const KeptGradientParams& p, Math math, cudaStream_t stream) {
  const auto launch = [&](auto kind) {
    const auto with_math = [&](auto constant) {
      return launch_kernel(kept_gradient<decltype(constant)::value, decltype(kind)::value>,
                           dim3(unsigned(p.tiles.blocks)), kKeptThreads,
                           KeptShared::of(p.rows.head.N).bytes(), stream, p);
    };
    return math == Math::kBf16 ? with_math(MathConstant<Math::kBf16>{})
                               : with_math(MathConstant<Math::kF16>{});
  };
  switch (p.terms) {
    case Terms::kPlain: return launch(std::integral_constant<Terms, Terms::kPlain>{});
    case Terms::kPrior: return launch(std::integral_constant<Terms, Terms::kPrior>{});
    default: return launch(std::integral_constant<Terms, Terms::kAll>{});
  }
}

}  // namespace tvmf::sm90
