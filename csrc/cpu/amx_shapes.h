// The shapes of AMX's tiles, as the processor reads them and as the tests' emulation does.
#pragma once

#include <cstdint>

namespace tvmf::cpu::amx {

// The operand of `ldtilecfg`.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace tvmf::cpu::amx
