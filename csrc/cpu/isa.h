// The choice of an instruction set, made once per process: the best one for which this build has
// kernels and which the machine has. Their tile kernels give the same bits.
#pragma once

#include "cpu/panel_tile.h"
#include "cpu/panels.h"
#include "cpu/tile.h"

namespace tvmf::cpu {

// "baseline", "avx2", "avx512", "avx512_bf16" or "amx_bf16". The environment variable
// TVMF_CPU_CAPABILITY may ask for less than the machine has.
const char* capability();

// Instantiated for float and double.
template <class T>
const TileKernels<T>& tile_kernels();
const PanelTileKernels& panel_tile_kernels();

// Products of our own with elements of floats, and of pairs of bfloat16: null where the machine has
// no instruction for these.
const PanelKernels& float_products();
const PanelKernels* pair_products();

}  // namespace tvmf::cpu
