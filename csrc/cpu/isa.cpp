#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "torch/check.h"
#ifdef TVMF_X86
#include "cpu/amx.h"
#endif

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
namespace amx_bf16 {
void multiply(const PanelProduct& product);
void multiply_transposed(const PanelProduct& product);
}  // namespace amx_bf16
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

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// The last of kNames that the environment variable TVMF_CPU_CAPABILITY allows.
int read_limit() {
  const char* forced = std::getenv("TVMF_CPU_CAPABILITY");
  const std::string limit = forced ? forced : std::end(kNames)[-1];
  const auto* name = std::find(std::begin(kNames), std::end(kNames), limit);
  TVMF_CHECK(name != std::end(kNames),
             "the environment variable TVMF_CPU_CAPABILITY must be baseline, avx2, avx512, "
             "avx512_bf16 or amx_bf16, got ",
             limit);
  return static_cast<int>(name - kNames);
}

#ifdef TVMF_X86
// AMX reads the panels of AVX-512. They are put together here, because no file that is compiled for
// a newer processor may run code when the library is loaded.
const PanelKernels* amx_pairs() {
  static const PanelKernels kernels = [] {
    PanelKernels kernels = avx512_bf16::kPanels;
    kernels.multiply = amx_bf16::multiply;
    kernels.multiply_transposed = amx_bf16::multiply_transposed;
    return kernels;
  }();
  return &kernels;
}
#endif

InstructionSet choose() {
#ifdef TVMF_X86
  const int limit = read_limit();
#ifdef TVMF_EMULATED
  const bool has_avx2 = true, has_avx512 = true, has_bf16 = true;
#else
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  if (limit >= 4 && has_bf16 && amx::available())
    return {kNames[4], TVMF_KERNELS_OF(avx512), amx_pairs()};
  if (limit >= 3 && has_bf16) return {kNames[3], TVMF_KERNELS_OF(avx512), &avx512_bf16::kPanels};
  if (limit >= 2 && has_avx512) return {kNames[2], TVMF_KERNELS_OF(avx512), nullptr};
  if (limit >= 1 && has_avx2) return {kNames[1], TVMF_KERNELS_OF(avx2), nullptr};
#endif
  return {kNames[0], TVMF_KERNELS_OF(baseline), nullptr};
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
