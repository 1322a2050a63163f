// The choice of an instruction set, made once per process: the best one for which this build has
// tile kernels and which the machine has. All of them give the same bits.
#pragma once

#include "cpu/tile.h"

namespace tvmf::cpu {

// "baseline", "avx2" or "avx512". The environment variable TVMF_CPU_CAPABILITY may ask for less
// than the machine has.
const char* capability();

// Instantiated for float and double.
template <class T>
const TileKernels<T>& tile_kernels();

}  // namespace tvmf::cpu
