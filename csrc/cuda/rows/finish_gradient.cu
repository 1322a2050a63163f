#include "cuda/rows/gradient_row.cuh"
#include "cuda/rows/rows.cuh"

namespace tvmf::rows {
namespace {

constexpr int kThreads = kFinishThreads;

template <class T>
__device__ __forceinline__ T element_at(const MatrixRef& matrix, int64_t row, int64_t col) {
  const VectorRef line{matrix.data, matrix.dtype, 1, 0};
  return value_at<T>(line, row * matrix.row_stride + col * matrix.col_stride);
}

// Four neighbouring elements of a row of x, which must be contiguous and aligned.
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

// A block adds up the partial gradients of its rows in order, and projects them. Where no kernel
// has left parts of the rows' sums of t c, it makes these sums of the gradients, as <x, dx>. The
// last block finishes the totals. Latency and memory bound this kernel: the loads of up to four
// slots of row_dot and eight partial gradients (four for float64) are in flight before the first
// sum is made.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    finish_gradient(const __grid_constant__ FinishGradientParams<T> p) {
  constexpr int kWarps = kThreads / kWarp, kSlots = 4, kRuns = 32 / int(sizeof(T));
  const CudaHead& head = p.head;
  if (blockIdx.x == gridDim.x - 1) {
    double sums[2] = {};
    for (int64_t i = threadIdx.x; i < p.totals; i += kThreads) {
      const auto pair = load_as<Pair<double>>(p.sums.totals + 2 * i);
      sums[0] += pair.low;
      sums[1] += pair.high;
    }
    block_sums(sums, static_cast<double*>(shared_memory()));
    if (threadIdx.x != 0) return;
    if (p.out.scale.data) {
      // dz/dscale = phi + bias = (z - prior) / scale
      const auto scale = Scale<T>::of(head);
      const double sum = (sums[0] + *p.scale_rest) / double(scale.value);
      store_at(p.out.scale, 0, T(sum * double(scale.derivative)));
    }
    if (p.out.kappa.data && head.kappa.stride == 0) store_at(p.out.kappa, 0, T(sums[1]));
    return;
  }

  T* dots_smem = static_cast<T*>(shared_memory());  // [rows, kWarps]
  const int rows = rows_to_finish(head.N, head.D);
  const int lane = threadIdx.x % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t first_row = int64_t(blockIdx.x) * rows, left = head.N - first_row;
  const T* dot_column = p.sums.row_dot + first_row + threadIdx.x % rows;
  const int64_t slots = threadIdx.x % rows < left ? p.row_dots : 0;
  const auto load_slots = [&](int64_t first, T(&dots)[kSlots]) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const int64_t slot = first + k * (kThreads / rows);
      dots[k] = slot < slots ? dot_column[slot * head.N] : T(0);
    }
  };
  // All first loads start before the first sum.
  const auto project = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    struct Run {
      T element[kWidth];
    };
    const int units = int((head.D + kWidth - 1) / kWidth);
    const int64_t count = (left < rows ? left : rows) * units;
    T sum[kWidth], x[kWidth], rnorm = 0, inv_loss_scale = 0;
    int row = 0;
    int64_t d = 0;
    const auto gather = [&](int64_t unit) {
      row = rows == 1 ? 0 : int(unit) / units;
      d = (unit - int64_t(row) * units) * kWidth;
      const int64_t n = first_row + row;
      const auto load_runs = [&](int64_t first, Run(&runs)[kRuns]) {
#pragma unroll
        for (int k = 0; k < kRuns; ++k)
          runs[k] = first + k < p.dx.count
                        ? load_as<Run>(p.dx.data + ((first + k) * head.N + n) * head.D + d)
                        : Run{};
      };
      Run runs[kRuns];
      load_runs(0, runs);
      rnorm = p.saved.x_rnorm[n];
      inv_loss_scale = *p.inv_loss_scale;
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
        if (s >= p.dx.count) break;
        load_runs(s, runs);
      }
    };
    const auto factor_of_sum = [&] { return outer_factor(inv_loss_scale, rnorm, p.unit_rows); };
    T dot = 0;
    int64_t unit = threadIdx.x;
    if (p.row_dots > 0) {
      T dots[kSlots];
      int64_t slot = int(threadIdx.x) / rows;
      load_slots(slot, dots);
      if (unit < count) gather(unit);
      for (;;) {
#pragma unroll
        for (int k = 0; k < kSlots; ++k) dot += dots[k];
        slot += kSlots * (kThreads / rows);
        if (slot >= slots) break;
        load_slots(slot, dots);
      }
      for (int mask = rows; mask < kWarp; mask *= 2) dot += __shfl_xor_sync(0xffffffff, dot, mask);
      if (lane < rows) dots_smem[lane * kWarps + warp] = dot;
    } else {
      // A warp's units are neighbours, so that they belong to few rows.
      if (lane < rows) dots_smem[lane * kWarps + warp] = 0;
      for (int64_t first = 0; first < count; first += kThreads) {
        dot = 0;
        if (first + threadIdx.x < count) {
          gather(first + threadIdx.x);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) dot += x[i] * (factor_of_sum() * sum[i]);
        }
        const int64_t first_unit = first + warp * kWarp, last_unit = first_unit + kWarp - 1;
        for (int64_t r = first_unit / units; r < rows && r <= last_unit / units; ++r) {
          const T of_row = warp_sum(row == r ? dot : T(0));
          if (lane == r) dots_smem[r * kWarps + warp] += of_row;
        }
      }
      if (count > kThreads) gather(unit);
    }
    __syncthreads();

    while (unit < count) {
      dot = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) dot += dots_smem[row * kWarps + w];
      const T factor = projection(dot, rnorm), all = factor_of_sum();
      const int64_t at = (first_row + row) * head.D + d;
      if constexpr (kWidth == 4) {
        T values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = all * sum[i] - factor * x[i];
        store_four_at(p.out.x, at, values);
      } else {
        store_at(p.out.x, at, all * sum[0] - factor * x[0]);
      }
      unit += kThreads;
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

}  // namespace

template <class T>
cudaError_t launch_finish_gradient(const FinishGradientParams<T>& p, cudaStream_t stream) {
  const bool scalars = p.out.scale.data || (p.out.kappa.data && p.head.kappa.stride == 0);
  if (!p.out.x.data && !scalars) return cudaSuccess;
  const int64_t N = p.head.N, rows = rows_to_finish(N, p.head.D);
  const int64_t blocks = (p.out.x.data ? ceil_div(N, rows) : 0) + 1;
  return launch_kernel(finish_gradient<T>, dim3(unsigned(blocks)), kThreads,
                       8 * kThreads / kWarp * int(sizeof(T)), stream, p);
}
template cudaError_t launch_finish_gradient(const FinishGradientParams<float>&, cudaStream_t);
template cudaError_t launch_finish_gradient(const FinishGradientParams<double>&, cudaStream_t);

}  // namespace tvmf::rows
