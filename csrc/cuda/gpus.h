// The GPUs that a plan can be made for: sizes of their parts, and the rates that kernels reach
// there. A plan depends on the sizes alone; the rates serve its prediction of time.
#pragma once

#include <cstdint>
#include <string>

namespace tvmf {

struct Gpu {
  const char* name;
  int64_t sms;               // streaming multiprocessors
  int64_t shared_per_block;  // bytes of shared memory that one block can have
  int64_t shared_per_sm;     // bytes
  int64_t l2;                // bytes
  double hbm_rate;           // bytes/s
  double l2_rate;            // bytes/s
  double flop_rate[5];       // operations/s, indexed by Math
  double launch_seconds;     // time of a kernel that has nothing to do

  bool wgmma = false;  // whether Hopper's own kernels run here, and the rates that they reach
  double wgmma_flop_rate = 0;
  double wgmma_l2_rate = 0;
};

// The GPU of this name ("H200", "H100", "A100", ...), or null.
const Gpu* find_gpu(const std::string& name);

// All names, separated by commas.
std::string gpu_names();

}  // namespace tvmf
