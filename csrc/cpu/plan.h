// How the CPU cuts a problem into blocks. The same numbers give the same plan on every machine and
// thread count, so that results are bitwise reproducible.
#pragma once

#include "problem.h"

namespace tvmf {

constexpr int64_t kStripe = 512;  // classes of a task, whose logits and class terms stay in L1

struct CpuPlan {
  int64_t class_block;  // classes of one matrix product: a multiple of kPad, whose tile stays in L2
  int64_t row_group;    // rows of a task
  int64_t stripe;       // classes of a task, at most kStripe
};

CpuPlan plan_cpu(int64_t N, int64_t C, int64_t D, int64_t element_size);

}  // namespace tvmf
