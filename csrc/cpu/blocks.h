// Blocks of classes and their products, and the tasks that threads share.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/plan.h"
#include "cpu/tensor.h"
#include "cpu/tile.h"

namespace tvmf {

// A run of classes that is multiplied at once.
struct Block {
  int64_t begin, count, ld;
  bool kept;  // whether its products stay for the backward pass
};

// The kept classes first, then the others, each in blocks.
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

// The column of each row's target in the block, or -1.
inline void block_labels(const std::vector<int64_t>& label, const Block& block, int64_t* out) {
  for (size_t n = 0; n < label.size(); ++n) {
    const int64_t column = label[n] - block.begin;
    out[n] = column >= 0 && column < block.count ? column : -1;
  }
}

// The products of the rows and a block's classes: product[n, i] = <x_n, w_{begin + i}>, and 0 in
// the padding. The product of the target is replaced by the one that its score was made of, in both
// passes: the loss of a row with a probability near 1 consists of its rounding errors alone.
template <class T>
void block_product(const Matrix<T>& x, const Matrix<T>& weight, const Block& block,
                   const int64_t* column, const T* target_product, T* product) {
  matmul<T>({product, x.rows, block.count, block.ld}, x, weight.transposed());
  for (int64_t n = 0; n < x.rows; ++n) {
    T* row = product + n * block.ld;
    std::fill(row + block.count, row + block.ld, T(0));
    if (column[n] >= 0) row[column[n]] = target_product[n];
  }
}

// The partition of a tile into tasks, by rows and by columns.
struct Tasks {
  int64_t N, ld;
  CpuPlan plan;
  int64_t groups = ceil_div(N, plan.row_group), stripes = ceil_div(ld, plan.stripe);

  template <class F>
  void run(const F& task) const {
    // With fewer than about 8 thousand elements, another thread costs more than it saves.
    const int64_t elements = std::min(N, plan.row_group) * std::min(ld, plan.stripe);
    parallel_for(0, groups * stripes, ceil_div(8192, elements), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / stripes, stripe = i % stripes;
        task(group, stripe,
             Range{group * plan.row_group, std::min(N, (group + 1) * plan.row_group)},
             Range{stripe * plan.stripe, std::min(ld, (stripe + 1) * plan.stripe)});
      }
    });
  }
};

// Work on whole rows of D features: at least 16 thousand elements a thread.
template <class F>
void parallel_rows(int64_t rows, int64_t D, const F& task) {
  parallel_for(0, rows, ceil_div(16384, D), task);
}

template <class T>
void rnorm(const Matrix<T>& rows, T* out) {
  parallel_rows(rows.rows, rows.cols, [&](int64_t begin, int64_t end) {
    tile_kernels<T>().rnorm(rows.data + begin * rows.row_stride, rows.row_stride, end - begin,
                            rows.cols, out + begin);
  });
}

}  // namespace tvmf
