// How the CPU cuts a problem. The same numbers give the same plan on every machine and for every
// number of threads, so that results are bitwise reproducible.
#pragma once

#include "problem.h"

namespace tvmf {

struct CpuPlan {
  // Classes per matrix product, a multiple of kPad. The N x class_block tile stays in the
  // second-level cache.
  int64_t class_block;
  int64_t row_group;  // rows per task
  int64_t stripe;     // classes per task
};

CpuPlan plan_cpu(int64_t N, int64_t C, int64_t D, int64_t element_size);

}  // namespace tvmf
