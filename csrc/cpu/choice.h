// Which matrix products serve a call: our own (panels.h), or those of PyTorch's library.
#pragma once

#include "cpu/memory.h"
#include "cpu/panels.h"

namespace tvmf::cpu {

// Null where the library's products serve. The same arguments give the same answer in both passes
// of a process. The environment variable TVMF_CPU_PRODUCT forces "own" or "library"; float64 has
// the library's alone.
const PanelKernels* own_products(ScalarType input, int64_t N, int64_t C, int64_t D);

}  // namespace tvmf::cpu
