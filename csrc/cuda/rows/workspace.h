// The parts of a workspace that the O(N) kernels of cuda/rows use, on every architecture: byte
// offsets from its beginning. The shapes stand in cuda/views.h.
#pragma once

#include "cuda/cost.h"
#include "similarity.h"

namespace tvmf::rows {

// Rows that one block of finish_rows merges. Up to 8192 partial results one block merges all of
// them, because that takes no longer than adding up the sums of several blocks.
inline int64_t finish_block_rows(int64_t N, int64_t splits) { return N * splits <= 8192 ? N : 16; }

// Threads of a block of finish_gradient, and its rows. Several rows share the sectors of row_dot,
// as long as a thread has at most four features and every multiprocessor gets a block.
constexpr int kFinishThreads = 512;
TVMF_HOST_DEVICE int rows_to_finish(int64_t N, int64_t D) {
  int rows = 1;
  while (rows < 8 && 2 * rows * D <= 4 * kFinishThreads && 2 * rows * 128 <= N) rows *= 2;
  return rows;
}

struct ForwardWorkspace {
  int64_t label, target_score, max, sum_exp, sum, rank, totals, finished;

  // The classes are split into `splits` runs, each of which leaves partial statistics of every row.
  // The same memory serves `segments` segments of rows one after another, but for the totals.
  static ForwardWorkspace take(Cursor& cursor, const CudaProblem& problem, int64_t splits,
                               int64_t segments = 1) {
    const int64_t N = problem.N, acc = accumulator_size(problem.x), partial = splits * N;
    ForwardWorkspace at;
    at.label = cursor.take(N * 8);
    at.target_score = cursor.take(N * acc);
    at.max = cursor.take(partial * acc);
    at.sum_exp = cursor.take(partial * acc);
    at.sum = cursor.take(problem.with_sum ? partial * acc : 0);
    at.rank = cursor.take(partial * 4);
    at.totals = cursor.take(segments * ceil_div(N, finish_block_rows(N, splits)) * 2 * 8);
    at.finished = cursor.take(4);
    return at;
  }
};

// How many partial sums of each kind the class kernels leave for finish_gradient to add up.
struct PartialCounts {
  int64_t row_dots;  // of each row's sum_c t c; 0 where finish_gradient makes it of dx
  int64_t features;  // of dx
  int64_t totals;    // of the two sums over all rows and classes
};

struct BackwardWorkspace {
  int64_t rows, targets, loss_scale, scale_rest, row_dot, dx, totals;

  static BackwardWorkspace take(Cursor& cursor, const CudaProblem& problem,
                                const PartialCounts& counts) {
    const int64_t N = problem.N, acc = accumulator_size(problem.x);
    BackwardWorkspace at;
    at.rows = cursor.take(N * round_up(5 * acc + 8, 16));  // GradientRow
    at.targets = cursor.take(N * 4 * acc);                 // TargetGradient
    at.loss_scale = cursor.take(2 * acc);
    at.scale_rest = cursor.take(8);
    at.row_dot = cursor.take(counts.row_dots * N * acc);
    at.dx = cursor.take(counts.features * N * problem.D * acc);
    at.totals = cursor.take(counts.totals * 2 * 8);
    return at;
  }
};

}  // namespace tvmf::rows
