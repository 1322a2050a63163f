// What both passes of a call with products of our own share: how it is cut, its features in panels,
// and the products of one block of classes.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/call.h"
#include "cpu/panel_tile.h"

namespace tvmf::cpu {

// Uninitialised float32 memory.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : tensor_(empty({size}, kDtype<float>)) {}
  float* data() const { return tensor_ ? cpu::data<float>(*tensor_) : nullptr; }

 private:
  OptionalTensor tensor_;
};

// Runs task(slot, i) for i < count on at most `slots` threads. A thread takes the next i when it is
// done with one; no two threads have the same slot, so that a slot may own memory.
template <class F>
void run_tasks(int64_t count, int64_t slots, const F& task) {
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, std::min(count, slots), 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t i; (i = next++) < count;) task(slot, i);
  });
}

// How a call is cut. Neither a block nor the order in which blocks are merged depends on the number
// of threads, and so the results do not either.
struct PanelPlan {
  PanelPlan(int64_t N, int64_t C, int64_t D, int64_t threads);

  int64_t block;  // classes per task
  int64_t wave;   // classes between two merges, whole pieces of the sum over classes
};

// Classes in a piece of the sum over classes.
constexpr int64_t kClassDepth = 256;

// Classes whose pieces are added to one sum of the features' gradient. Such sums are added in turn,
// so that the error of a million classes is not that of thousands of additions to one number.
constexpr int64_t kClassesPerSum = 8192;

// Panels of features that a task of the backward pass takes at a time: their weights and gradients
// stay in the second-level cache.
constexpr int64_t kFeaturePanels = 16;

// Bytes that the passes allocate at most beside what is saved, but for a few numbers for each row
// and class.
int64_t panel_workspace(int64_t N, int64_t C, int64_t D, int64_t per_element, int64_t kept,
                        int64_t threads);

class PanelCall {
 public:
  PanelCall(const Call<float>& call, const PanelKernels& kernels);

  // The samples as columns, [N / 16, D / per_element, 16]: the product with weights takes them so.
  Buffer columns_of_features() const;
  // The samples as rows that are summed over, [D / 16, N / per_element, 16].
  Buffer rows_of_features() const;

  // Packs the weights of a block, of which `w` are the rows, for its product.
  void pack_weights(const Matrix<float>& w, float* packed) const;
  // Writes <w_c, x_n> for the samples of the panels [begin, end).
  void multiply(const float* packed, int64_t count, const Buffer& columns, int64_t begin,
                int64_t end, float* out, int64_t out_distance) const;

  // The row of each sample's target in the block, or -1 where it is in another; out is [16].
  void targets(int64_t begin, int64_t count, int64_t panel, int32_t* out) const;

  // The classes whose products are kept for the backward pass, of `kept` that there is memory for:
  // whole blocks.
  int64_t kept_classes(int64_t kept) const {
    return kept >= call.C ? call.C : kept / plan.block * plan.block;
  }

  int64_t packed_distance(int64_t count) const { return count * kPanel + kPanel; }
  int64_t packed_size() const { return ceil_div(D_elements, kPanel) * packed_distance(plan.block); }
  // The part of a kept block's products that is in whole panels; the last samples follow, as rows
  // of as many columns as there are samples.
  int64_t whole_panels() const { return call.N / kPanel; }
  int64_t last_columns() const { return call.N % kPanel; }

  const Call<float>& call;
  const PanelKernels& kernels;
  const PanelTileKernels& tile;
  const int64_t slots;  // threads that have memory of their own
  const PanelPlan plan;
  const int64_t panels;      // of samples
  const int64_t D_panels;    // of features
  const int64_t D_elements;  // elements that a sum over features runs over
  const int64_t N_elements;
  Rows<float> input;
  const Matrix<float> x;
};

// A number for each sample, and zeros up to whole panels.
inline std::vector<float> padded(const float* values, int64_t N) {
  std::vector<float> out(round_up(N, kPanel));
  std::copy(values, values + N, out.begin());
  return out;
}

}  // namespace tvmf::cpu
