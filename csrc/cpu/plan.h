// How the CPU cuts a problem into blocks. The same numbers give the same plan on every machine and
// thread count, so that results are bitwise reproducible.
#pragma once

#include "problem.h"

namespace tvmf {

struct CpuPlan {
  int64_t class_block;  // classes per matrix product: multiple of kPad, the N x block tile in L2
  int64_t row_group;    // rows per task
  int64_t stripe;       // classes per task: logits and class terms stay in L1
};

CpuPlan plan_cpu(int64_t N, int64_t C, int64_t D, int64_t element_size);

}  // namespace tvmf
