#include "cpu/isa.h"

#include <cstdlib>
#include <string>

namespace tvmf::cpu {

#define TVMF_DECLARE_ISA(isa)               \
  namespace isa {                           \
  extern const TileKernels<float> kFloat;   \
  extern const TileKernels<double> kDouble; \
  extern const PanelTileKernels kPanelTile; \
  extern const PanelKernels kPanels;        \
  }
TVMF_DECLARE_ISA(baseline)
#ifdef TVMF_X86
TVMF_DECLARE_ISA(avx2)
TVMF_DECLARE_ISA(avx512)
namespace avx512_bf16 {
extern const PanelKernels kPanels;
}
#endif

namespace {

struct InstructionSet {
  const char* name;
  const TileKernels<float>* float_kernels;
  const TileKernels<double>* double_kernels;
  const PanelTileKernels* panel_tile;
  const PanelKernels* float_products;
  const PanelKernels* pair_products;
};

#define TVMF_KERNELS_OF(isa) &isa::kFloat, &isa::kDouble, &isa::kPanelTile, &isa::kPanels

InstructionSet choose() {
#ifdef TVMF_X86
  const char* forced = std::getenv("TVMF_CPU_CAPABILITY");
  const std::string limit = forced ? forced : "avx512_bf16";
#ifdef TVMF_EMULATED
  const bool has_avx2 = true, has_avx512 = true, has_bf16 = true;
#else
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  if (has_bf16 && limit == "avx512_bf16")
    return {"avx512_bf16", TVMF_KERNELS_OF(avx512), &avx512_bf16::kPanels};
  if (has_avx512 && limit.starts_with("avx512"))
    return {"avx512", TVMF_KERNELS_OF(avx512), nullptr};
  if (has_avx2 && limit != "baseline") return {"avx2", TVMF_KERNELS_OF(avx2), nullptr};
#endif
  return {"baseline", TVMF_KERNELS_OF(baseline), nullptr};
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

const PanelTileKernels& panel_tile_kernels() { return *chosen().panel_tile; }
const PanelKernels& float_products() { return *chosen().float_products; }
const PanelKernels* pair_products() { return chosen().pair_products; }

}  // namespace tvmf::cpu
