// How a problem is cut into pieces. Pure: the same numbers give the same plan on every machine and
// thread count, so that results are bitwise reproducible.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tvmf {

struct CpuPlan {
  int64_t class_block;  // classes per matrix product: multiple of kPad, the N x block tile in L2
  int64_t row_group;    // rows per task
  int64_t stripe;       // classes per task: logits and class terms stay in L1
};

// Row strides of product tiles are multiples of this: whole 64-byte vectors of float and double.
constexpr int64_t kPad = 16;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

CpuPlan plan_cpu(int64_t N, int64_t C, int64_t D, int64_t element_size);

}  // namespace tvmf
