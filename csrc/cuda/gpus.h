// The GPUs that a plan can be made for: sizes of their parts, and the rates that kernels reach
// there. A plan depends on the sizes alone; the rates serve its prediction of time.
#pragma once

#include <cstdint>
#include <string>

namespace tvmf {

struct Gpu {
  const char* name;
  // The compute capability whose instructions kernels may use here, 90 for 9.0. On a device of this
  // machine it is 80 where the build has no code for the device's own.
  int capability;
  int64_t sms;               // streaming multiprocessors
  int64_t shared_per_block;  // bytes of shared memory that one block can have
  int64_t shared_per_sm;     // bytes
  int64_t l2;                // bytes
  double hbm_rate;           // bytes/s
  double l2_rate;            // bytes/s
  double flop_rate[5];       // operations/s of the portable kernels, indexed by Math
  double launch_seconds;     // time of a kernel that has nothing to do
  double wait_seconds;       // time of a load whose address another load brought
  double clock;              // cycles/s

  // Operations/s of the main loops of the kernels that are written for this capability, and 0 where
  // there are none: those of the cosines, which round the weight, and those of the gradients.
  double cosine_rate = 0, product_rate = 0;
};

// The GPU of this name ("H200", "H100", "A100", ...), or null.
const Gpu* find_gpu(const std::string& name);

// All names, separated by commas.
std::string gpu_names();

}  // namespace tvmf
