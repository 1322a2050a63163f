// What the O(N) kernels cost by count. Latency bounds them: a kernel takes its longest chain of
// loads that wait for each other, as often as its blocks need more than one round to run.
#pragma once

#include <cmath>

#include "cuda/rows/workspace.h"

namespace tvmf::rows {

// The waits of each kernel's chain. They were chosen to fit times on an H200, since a chain also
// has sums over a block and double arithmetic; docs/measurements.md compares them.
constexpr int kPrepareWaits = 3;       // label, its weights, the sums of a block
constexpr int kFinishWaits = 5;        // of finish_rows in one block
constexpr int kFinishBlocksWaits = 8;  // in several, where a warp's lanes share a row
constexpr int kFinishLossWaits = 1;
constexpr int kArriveWaits = 2;  // until a block knows that it is the last: its fence, its counter
constexpr int kPrepareGradientWaits = 5;  // for each 512 rows, which one block makes
constexpr int kFinishGradientWaits = 4;

// One launch of `blocks` blocks, `resident` of which share a multiprocessor. `l2` bytes move in it.
inline KernelCost row_kernel(const char* name, double blocks, int resident, int waits, double l2,
                             const Gpu& gpu) {
  const double rounds = std::ceil(blocks / double(resident * gpu.sms));
  return {.name = name, .launches = 1, .l2 = l2, .alone = rounds * waits * gpu.wait_seconds};
}

// The features have `arranged_items` items of 16 bytes to arrange (sm90/arrange.cuh).
inline KernelCost prepare_cost(const CudaProblem& p, double arranged_items, double l2,
                               const Gpu& gpu) {
  // Blocks of 128 threads, seven of which have room for their registers.
  const double classes = p.x == DType::kFloat16 && p.weight() == DType::kFloat32 ? double(p.C) : 0;
  const double blocks = double(p.N) + std::ceil(classes / 4) + std::ceil(arranged_items / 128);
  return row_kernel("prepare_rows", blocks, 7, kPrepareWaits, l2, gpu);
}

// The last block adds up the sums of several. Of the segments of rows the last one does so.
inline KernelCost finish_cost(const CudaProblem& p, int64_t splits, double l2, bool last_segment,
                              bool segments, const Gpu& gpu) {
  const int64_t blocks = ceil_div(p.N, finish_block_rows(p.N, splits));
  const bool adds_up = last_segment && (blocks > 1 || segments);
  const int waits = (blocks > 1 ? kFinishBlocksWaits : kFinishWaits) +
                    (adds_up ? kArriveWaits + kFinishLossWaits : 0);
  return row_kernel("finish_rows", double(blocks), 1, waits, l2, gpu);
}

// The first block makes the terms of all rows, so that more rows take longer whatever the GPU has.
inline KernelCost prepare_gradient_cost(const CudaProblem& p, double l2, const Gpu& gpu) {
  const int rounds = int(std::min<int64_t>(ceil_div(p.N, 512), int64_t(1) << 20));
  return row_kernel("prepare_gradient", 1, 1, kPrepareGradientWaits * rounds, l2, gpu);
}

inline KernelCost finish_gradient_cost(const CudaProblem& p, double l2, const Gpu& gpu) {
  const double blocks = double(ceil_div(p.N, rows_to_finish(p.N, p.D))) + 1;
  const int resident = p.x == DType::kFloat64 ? 1 : 2;
  return row_kernel("finish_gradient", blocks, resident, kFinishGradientWaits, l2, gpu);
}

}  // namespace tvmf::rows
