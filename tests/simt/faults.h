// The emulator's own test kernels: each right, or with one fault planted.
#pragma once

#include <cstdint>
#include <string>

namespace faults {

struct Case {
  const void* x;
  float* y;
  int n;         // bytes of x
  int argument;  // what the kernel makes of it
  bool right;
};
void launch(const std::string& name, unsigned grid, int threads, int shared_bytes, const Case& c);

// Hopper's: two matrices in boxes of 128 bytes by so many rows.
struct Matrix {
  const void* data;
  int bytes;  // of an element
  int64_t rows, cols, row_stride;
  int box_rows, box_cols;
};
struct CaseSm90 {
  Matrix a, b;
  float* y;
  int argument[4];
  bool right;
};
void launch_sm90(const std::string& name, unsigned grid, int threads, int shared_bytes,
                 const CaseSm90& c);

}  // namespace faults
