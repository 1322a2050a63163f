// The emulator's version of csrc/cuda/shared.cuh.
#pragma once

#include "simt.h"

namespace tvmf {

__forceinline__ void* shared_memory() { return simt::shared_memory(); }

}  // namespace tvmf
