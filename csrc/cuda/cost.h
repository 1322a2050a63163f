// A problem as the CUDA kernels see it, and what a pass over it costs by count. Everything here is
// pure: the same numbers give the same result on every machine.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/gpus.h"
#include "cuda/plan_fields.h"
#include "problem.h"

namespace tvmf {

// How two operands are multiplied: on tensor cores, except for the last two.
enum class Math : int32_t { kF16, kBf16, kTf32, kF32, kF64 };

constexpr Math math_of(DType x, bool allow_tf32) {
  switch (x) {
    case DType::kFloat16: return Math::kF16;
    case DType::kBFloat16: return Math::kBf16;
    case DType::kFloat32: return allow_tf32 ? Math::kTf32 : Math::kF32;
    default: return Math::kF64;
  }
}

// Bytes of a statistic, a norm or an accumulator.
constexpr int64_t accumulator_size(DType x) { return x == DType::kFloat64 ? 8 : 4; }

// The dtype in which the kernels read a weight. Where the caller's is another, a copy is made.
constexpr DType weight_dtype_read(DType x, DType given_weight) {
  if (given_weight == x || size_of(x) > 2) return x;
  return DType::kFloat32;
}

// How the weight lies in memory as the kernels read it. The default is a new contiguous tensor.
struct WeightLayout {
  int64_t row_stride, col_stride;  // in elements
  bool aligned = true;             // whether its first element lies on a 16-byte boundary
};

// Rows that a call can have: a tile reaches beyond the last row by less than kLargestTile, and
// every row that it reaches has a 32-bit index.
constexpr int64_t kLargestTile = 256;
constexpr int64_t kMostRows = (int64_t(1) << 31) - 1 - kLargestTile;

struct CudaProblem {
  int64_t N, C, D;
  DType x;
  DType given_weight;  // the caller's dtype of the weight
  bool allow_tf32;     // whether float32 products may be rounded to TF32
  int64_t kept;        // elements for each row that the caller offers to keep (KeptProducts)
  bool with_sum;       // whether sums of logits over the classes are wanted
  WeightLayout layout;

  Math math() const { return math_of(x, allow_tf32); }
  DType weight() const { return weight_dtype_read(x, given_weight); }
  // The row stride of the products that the portable path keeps: those of all classes, or of none.
  // Any other number was made for Hopper's kernels, and the products are made again. This happens
  // where a hook of saved tensors gives the backward pass a weight with another memory layout.
  int64_t kept_products() const { return kept == round_up(C, kPad) ? kept : 0; }
};

// What the forward pass keeps of its products, where the kernels of an architecture keep them.
struct KeptProducts {
  int64_t most_rows;     // the most rows of which products are kept
  int64_t row_multiple;  // rows are rounded up to a multiple of it
  int64_t beside;        // elements that are kept for each class beside the products

  // The elements for each row of N that hold all of it: SavedLayout's `kept`. tvmf_ext/head.py
  // computes it too.
  int64_t elements(int64_t N, int64_t C) const {
    // Hopper's path keeps kPad more, so that the number says whose products they are.
    return round_up(ceil_div(C * (round_up(N, row_multiple) + beside), N), kPad) +
           (row_multiple > 1 ? kPad : 0);
  }
};

// All launches of one kernel in a pass: counts, and the times that follow from them. All bytes and
// seconds are sums over the launches.
struct KernelCost {
  const char* name = nullptr;
  int64_t launches = 0;
  double flops = 0;     // floating-point operations of the products
  double hbm = 0;       // bytes that cross the GPU's memory interface
  double l2 = 0;        // bytes between the L2 cache and the multiprocessors
  double products = 0;  // seconds of the products on the multiprocessor that makes most tiles
  double between = 0;   // seconds between its products, in which only loads go on
  double alone = 0;  // seconds at the start and the end of launches, in which nothing else goes on
  double seconds = 0;  // the predicted time

  static constexpr int kStart = 3;  // waits from the start of a launch to its first product
  static constexpr int kTile = 3;   // waits at the end of a tile that is stored
};

// One pass of a plan.
struct PassCost {
  std::vector<KernelCost> kernels;

  template <class T>
  T sum(T KernelCost::* part) const {
    T total = 0;
    for (const KernelCost& kernel : kernels) total += kernel.*part;
    return total;
  }
};

struct Cost {
  PassCost forward, backward;
};

// Bytes that a call needs beside its results: what the forward pass saves for the backward pass,
// and what each pass has while it runs.
struct Memory {
  int64_t saved, forward, backward;
};

constexpr int64_t kMiB = int64_t(1) << 20;
constexpr int64_t kWorkspaceBudget = 64 * kMiB;  // bytes, whatever the number of classes is

// Bytes between the L2 cache and the multiprocessors are counted in sectors, as the emulator does:
// a scattered access takes a whole one, and two neighbours of 2 bytes leave half of 4 bytes unused.
constexpr double kSectorBytes = 32;

// Hands out the parts of a workspace one after another: take() returns the offset of a part, in
// bytes, which is a multiple of 256.
struct Cursor {
  int64_t at = 0;
  int64_t take(int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 256);
    return here;
  }
};

// Fills in the predicted times: a kernel takes the longest of its products with the work between
// them, its bytes of memory and its bytes of the L2 cache; and before and after that the start and
// the end of its launches.
inline void predict(PassCost& pass, const Gpu& gpu) {
  for (KernelCost& kernel : pass.kernels)
    kernel.seconds = double(kernel.launches) * gpu.launch_seconds + kernel.alone +
                     std::max({kernel.products + kernel.between, kernel.hbm / gpu.hbm_rate,
                               kernel.l2 / gpu.l2_rate});
}

}  // namespace tvmf
