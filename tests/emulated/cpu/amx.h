// An emulation of csrc/cpu/amx.h, after the pseudocode of Intel's Instruction Set Extensions
// Programming Reference. What would raise an exception of the processor ends the process.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/amx_shapes.h"

namespace tvmf::cpu::amx {

struct Tile {
  int rows = 0, row_bytes = 0;
  unsigned char bytes[16][64] = {};
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline Tile& tile(int number) {
  require(configured, "a tile is used before ldtilecfg");
  require(tiles[number].rows > 0, "a tile is used that has no rows");
  return tiles[number];
}

inline bool available() { return true; }

inline void release() {
  for (Tile& t : tiles) t = {};
  configured = false;
}

inline void configure(const TileShapes& shapes) {
  require(shapes.palette == 1 && shapes.start_row == 0, "the palette must be 1, the first row 0");
  release();
  configured = true;
  for (int i = 0; i < 8; ++i) {
    const int rows = shapes.rows[i], row_bytes = shapes.row_bytes[i];
    require(rows <= 16 && row_bytes <= 64, "a tile has at most 16 rows of 64 bytes");
    require((rows == 0) == (row_bytes == 0), "a tile has both rows and columns, or neither");
    tiles[i].rows = rows;
    tiles[i].row_bytes = row_bytes;
  }
}

template <int kTile>
void zero() {
  std::memset(tile(kTile).bytes, 0, sizeof(Tile::bytes));
}

template <int kTile>
void load(const void* from, int64_t stride) {
  Tile& t = tile(kTile);
  std::memset(t.bytes, 0, sizeof(t.bytes));
  for (int i = 0; i < t.rows; ++i)
    std::memcpy(t.bytes[i], static_cast<const char*>(from) + i * stride, t.row_bytes);
}

template <int kTile>
void store(void* to, int64_t stride) {
  const Tile& t = tile(kTile);
  for (int i = 0; i < t.rows; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, t.bytes[i], t.row_bytes);
}

// Denormal numbers count as 0, as operands and as results.
inline float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.f, value) : value;
}

inline float number(const Tile& t, int row, int col) {
  float value;
  std::memcpy(&value, t.bytes[row] + 4 * col, 4);
  return value;
}

// One half of a pair of bfloat16: 0 is the lower one.
inline float half(const Tile& t, int row, int col, int half) {
  const uint32_t pair = std::bit_cast<uint32_t>(number(t, row, col));
  return flushed(std::bit_cast<float>(half ? pair & 0xffff0000 : pair << 16));
}

template <int kSum, int kA, int kB>
void multiply_add() {
  Tile &sum = tile(kSum), &a = tile(kA), &b = tile(kB);
  require(a.rows == sum.rows && b.row_bytes == sum.row_bytes && a.row_bytes == 4 * b.rows,
          "the shapes of three tiles do not fit");
  for (int m = 0; m < sum.rows; ++m)
    for (int n = 0; n < sum.row_bytes / 4; ++n) {
      float halves[2] = {};
      for (int k = 0; k < b.rows; ++k)
        for (int i = 0; i < 2; ++i)
          halves[i] = flushed(std::fma(half(a, m, k, i), half(b, k, n, i), halves[i]));
      const float added = flushed(halves[0] + halves[1]);
      const float total = flushed(flushed(number(sum, m, n)) + added);
      std::memcpy(sum.bytes[m] + 4 * n, &total, 4);
    }
}

}  // namespace tvmf::cpu::amx
