#include "cpu/plan.h"

#include <algorithm>

namespace tvmf {

CpuPlan plan_cpu(int64_t N, int64_t C, int64_t, int64_t element_size) {
  // The tile takes 2 MiB, the L2 cache of one core. Fewer than 256 classes would slow the matrix
  // product down, and more than 4096 do not make it faster.
  const int64_t tile = (int64_t(2) << 20) / element_size / std::max<int64_t>(N, 1);
  const int64_t block = std::clamp<int64_t>(tile / kPad * kPad, 256, 4096);
  return {std::min(block, round_up(C, kPad)), 32, kStripe};
}

}  // namespace tvmf
