#include "cuda/rows/gradient_terms.cuh"
#include "cuda/rows/unit_rows.cuh"

namespace tvmf::rows {
namespace {

constexpr int kThreads = kGradientThreads;

// The first block makes the terms of all rows; the blocks beyond arrange or copy the features.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    prepare_gradient(const __grid_constant__ PrepareGradientParams<T> p) {
  const CudaHead& head = p.head;
  if (blockIdx.x > 0) {
    const int64_t i = int64_t(blockIdx.x - 1) * kThreads + threadIdx.x;
    if constexpr (sizeof(T) == 4) {
      if (p.unit_x.data)
        copy_unit_row(Operand<f16>::of(head.x, head.N, head.D), p.saved.x_rnorm, p.unit_x, i);
      else
        sm90::arrange(head, p.arranged, i);
    }
    return;
  }
  const T loss_scale = make_gradient_rows</*kAhead=*/true>(
      p, static_cast<double*>(shared_memory()),
      [&](int64_t n, GradientRow<T> row, const TargetGradient<T>& target) {
        if constexpr (sizeof(T) == 4)
          if (p.float16) row.scaled_rnorm = unit_rnorm(row.rnorm);
        store_parts(p.gradient.rows + n, row);
        store_parts(p.gradient.targets + n, target);
      });
  if (!p.float16) return;
  for (int64_t n = threadIdx.x; n < head.N; n += kThreads)
    p.gradient.rows[n].scaled_rnorm *= loss_scale;
}

}  // namespace

template <class T>
cudaError_t launch_prepare_gradient(const PrepareGradientParams<T>& p, cudaStream_t stream) {
  const int64_t items = p.unit_x.data ? unit_items(p.unit_x, p.head.N) : p.arranged.items();
  const int64_t blocks = 1 + ceil_div(items, kThreads);
  return launch_kernel(prepare_gradient<T>, dim3(unsigned(blocks)), kThreads, kGradientBytes,
                       stream, p);
}
template cudaError_t launch_prepare_gradient(const PrepareGradientParams<float>&, cudaStream_t);
template cudaError_t launch_prepare_gradient(const PrepareGradientParams<double>&, cudaStream_t);

}  // namespace tvmf::rows
