// How the work of a call is cut: the classes into blocks, one matrix product each, and the tile of
// a block into tasks of some rows and some columns, which run on all threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/plan.h"
#include "cpu/tile.h"

namespace tvmf::cpu {

struct Block {
  int64_t begin, count;
  int64_t stride;  // of the tile's rows: count, rounded up to whole vectors
  bool kept;       // whether the forward pass keeps its products
};

// The classes whose products are kept come first. No block mixes them with the others.
inline std::vector<Block> blocks_of(int64_t C, int64_t kept, int64_t class_block) {
  std::vector<Block> blocks;
  const int64_t kept_classes = std::min(kept, C);
  for (int64_t begin = 0; begin < C;) {
    const bool keep = begin < kept_classes;
    const int64_t count = std::min(class_block, (keep ? kept_classes : C) - begin);
    blocks.push_back({begin, count, round_up(count, kPad), keep});
    begin += count;
  }
  return blocks;
}

// The tasks of one tile: `groups` runs of rows times `stripes` runs of columns.
struct Tasks {
  Tasks(int64_t N, int64_t stride, const CpuPlan& plan)
      : N(N),
        stride(stride),
        plan(plan),
        groups(ceil_div(N, plan.row_group)),
        stripes(ceil_div(stride, plan.stripe)) {}

  // Calls task(group, stripe, rows, columns).
  template <class F>
  void run(const F& task) const {
    // With fewer than some 8 thousand elements a thread costs more time than it saves.
    const int64_t elements = std::min(N, plan.row_group) * std::min(stride, plan.stripe);
    torch::stable::parallel_for(
        0, groups * stripes, ceil_div(8192, elements), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t group = i / stripes, stripe = i % stripes;
            task(group, stripe,
                 Range{group * plan.row_group, std::min(N, (group + 1) * plan.row_group)},
                 Range{stripe * plan.stripe, std::min(stride, (stripe + 1) * plan.stripe)});
          }
        });
  }

  int64_t N, stride;
  CpuPlan plan;
  int64_t groups, stripes;
};

// Calls task(begin, end) for runs of rows of D features, each of at least 16 thousand elements.
template <class F>
void parallel_rows(int64_t rows, int64_t D, const F& task) {
  torch::stable::parallel_for(0, rows, ceil_div(16384, D), task);
}

}  // namespace tvmf::cpu
