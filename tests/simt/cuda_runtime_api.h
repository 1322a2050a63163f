// The emulator's version of CUDA's header of this name.
#pragma once

#include "simt.h"
