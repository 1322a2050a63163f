// How a warpgroup's products [64 classes, rows] lie in its lanes: a lane has two classes and, for
// each of them, 8 successive rows of every 32. Sums over the classes are made by shuffles, 8 rows
// at a time.
#pragma once

#include "cuda/sm90/mainloop.cuh"

namespace tvmf::sm90 {

// Combines v[i] of the 8 lanes that have the same rows; lane `group` gets the result for v[group].
template <class T, class Add>
__device__ __forceinline__ T gather_rows(const T (&v)[8], int group, const Add& add) {
  T four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T keep = group & 4 ? v[i + 4] : v[i], send = group & 4 ? v[i] : v[i + 4];
    four[i] = add(keep, __shfl_xor_sync(0xffffffff, send, 16));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T keep = group & 2 ? four[i + 2] : four[i], send = group & 2 ? four[i] : four[i + 2];
    two[i] = add(keep, __shfl_xor_sync(0xffffffff, send, 8));
  }
  const T keep = group & 1 ? two[1] : two[0], send = group & 1 ? two[0] : two[1];
  return add(keep, __shfl_xor_sync(0xffffffff, send, 4));
}

__device__ __forceinline__ float sum_rows(const float (&v)[8], int group) {
  return gather_rows(v, group, [](float a, float b) { return a + b; });
}

// Loads successive rows of a vector in shared memory: one, or a multiple of 4.
template <int kCount>
__device__ __forceinline__ void load_rows(float (&v)[kCount], const float* smem, int first) {
  constexpr int kRun = kCount < 4 ? kCount : 4;
  struct alignas(4 * kRun) Run {
    float v[kRun];
  };
#pragma unroll
  for (int at = 0; at < kCount; at += kRun) {
    const Run run = load_as<Run>(smem + first + at);
#pragma unroll
    for (int i = 0; i < kRun; ++i) v[at + i] = run.v[i];
  }
}

// A bit for each 32 rows of a warp: whether one of them has its target among the warp's 16 classes.
template <int kGroups>
__device__ __forceinline__ unsigned groups_with_target(const int* label_smem, int first_class,
                                                       int lane) {
  unsigned groups = 0;
#pragma unroll
  for (int b = 0; b < kGroups; ++b) {
    const int y = label_smem[b * 32 + lane] - first_class;
    if (__ballot_sync(0xffffffff, y >= 0 && y < 16)) groups |= 1u << b;
  }
  return groups;
}

// The index of the accumulator of row i of 8, of group b of 32 rows, and of class h of 2.
__host__ __device__ constexpr int accumulator_of(int b, int i, int h) {
  return (b * 4 + i / 2) * 4 + h * 2 + i % 2;
}

// Where products that are kept have four of the 8 rows from `row` on: the first four, or the
// others.
__host__ __device__ constexpr int kept_half(int row, int half) {
  return row / 32 * 32 + half * 16 + row % 32 / 2;
}

}  // namespace tvmf::sm90
