#include "cpu/isa.h"

#include <cstdlib>
#include <string>

namespace tvmf::cpu {

#define TVMF_DECLARE_ISA(isa)               \
  namespace isa {                           \
  extern const TileKernels<float> kFloat;   \
  extern const TileKernels<double> kDouble; \
  }
TVMF_DECLARE_ISA(baseline)
#ifdef TVMF_X86
TVMF_DECLARE_ISA(avx2)
TVMF_DECLARE_ISA(avx512)
#endif

namespace {

struct InstructionSet {
  const char* name;
  const TileKernels<float>* float_kernels;
  const TileKernels<double>* double_kernels;
};

InstructionSet choose() {
#ifdef TVMF_X86
  const char* forced = std::getenv("TVMF_CPU_CAPABILITY");
  const std::string limit = forced ? forced : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (has_avx512 && limit == "avx512") return {"avx512", &avx512::kFloat, &avx512::kDouble};
  if (has_avx2 && limit != "baseline") return {"avx2", &avx2::kFloat, &avx2::kDouble};
#endif
  return {"baseline", &baseline::kFloat, &baseline::kDouble};
}

const InstructionSet& chosen() {
  static const InstructionSet chosen = choose();
  return chosen;
}

}  // namespace

const char* capability() { return chosen().name; }

template <>
const TileKernels<float>& tile_kernels<float>() {
  return *chosen().float_kernels;
}
template <>
const TileKernels<double>& tile_kernels<double>() {
  return *chosen().double_kernels;
}

}  // namespace tvmf::cpu
