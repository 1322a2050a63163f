#include "cuda/rows/rows.cuh"
#include "cuda/rows/unit_rows.cuh"

namespace tvmf::rows {
namespace {

constexpr int kThreads = 256;

template <class V>
__global__ void __launch_bounds__(kThreads) unit_rows(const __grid_constant__ UnitRowsParams p) {
  copy_unit_row(Operand<V>::of(p.from, p.lines, p.elements), p.rnorm, p.to,
                int64_t(blockIdx.x) * kThreads + threadIdx.x);
}

}  // namespace

cudaError_t launch_unit_rows(const UnitRowsParams& p, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(unit_items(p.to, p.lines), kThreads)));
  return launch_kernel(p.from.dtype == DType::kFloat32 ? unit_rows<float> : unit_rows<f16>, grid,
                       kThreads, 0, stream, p);
}

}  // namespace tvmf::rows
