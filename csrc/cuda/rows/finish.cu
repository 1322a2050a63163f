#include "cuda/rows/merge.cuh"

namespace tvmf::rows {
namespace {

constexpr int kThreads = 512;

// A block merges its rows and leaves the sums of their losses. One warp of the last block adds up
// those of all blocks, in order.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    finish_rows(const __grid_constant__ FinishParams<T> p) {
  double* smem = static_cast<double*>(shared_memory());
  double totals[2] = {};
  merge_rows<T, WholeBlock>(p, blockIdx.x * p.block_rows, p.block_rows, smem, totals);
  if (!reduces_loss(p)) return;
  block_sums(totals, smem);
  if (threadIdx.x >= kWarp) return;
  if (p.all_blocks > 1) {
    int last = 0;
    if (threadIdx.x == 0) {
      store_as(p.totals + 2 * (p.first_block + blockIdx.x), Pair<double>{totals[0], totals[1]});
      if (p.first_block + gridDim.x == p.all_blocks) last = last_to_arrive(p.finished, gridDim.x);
    }
    last = __shfl_sync(0xffffffff, last, 0);
    __syncwarp();
    if (!last) return;
    totals[0] = totals[1] = 0;
    for (int64_t i = threadIdx.x; i < p.all_blocks; i += kWarp) {
      const auto pair = load_as<Pair<double>>(p.totals + 2 * i);
      totals[0] += pair.low;
      totals[1] += pair.high;
    }
    totals[0] = warp_sum(totals[0]);
    totals[1] = warp_sum(totals[1]);
  }
  if (threadIdx.x == 0) store_loss<T>(p, totals);
}

}  // namespace

template <class T>
cudaError_t launch_finish(const FinishParams<T>& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.head.N, p.block_rows);
  return launch_kernel(finish_rows<T>, dim3(unsigned(blocks)), kThreads, 2 * kThreads / kWarp * 8,
                       stream, p);
}
template cudaError_t launch_finish(const FinishParams<float>&, cudaStream_t);
template cudaError_t launch_finish(const FinishParams<double>&, cudaStream_t);

}  // namespace tvmf::rows
