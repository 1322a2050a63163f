#include "cpu/plan.h"

#include <algorithm>

#include "cpu/tile.h"

namespace tvmf {

CpuPlan plan_cpu(int64_t N, int64_t C, int64_t, int64_t element_size) {
  // A tile of 2 MiB fits the second-level cache of one core. Fewer than 256 classes would starve
  // the matrix product, and more than 4096 do not make it faster.
  const int64_t tile = (int64_t(2) << 20) / element_size / std::max<int64_t>(N, 1);
  const int64_t block = std::clamp<int64_t>(tile / kPad * kPad, 256, 4096);
  CpuPlan plan;
  plan.class_block = std::min(block, round_up(C, kPad));
  plan.row_group = 32;
  plan.stripe = cpu::kStripe;
  return plan;
}

}  // namespace tvmf
