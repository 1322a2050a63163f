// The kernels of faults.cu and faults_sm90.cu, which test the emulator.
#pragma once

#include <cstdint>
#include <string>

namespace faults {

struct Case {
  const void* x;
  float* y;
  int n;         // bytes of x
  int argument;  // its meaning depends on the kernel
  bool right;    // without the planted fault
};
void launch(const std::string& name, unsigned grid, int threads, int shared_bytes, const Case& c);

// A matrix that tensor copies read in boxes of box_rows lines of 128 bytes.
struct Matrix {
  const void* data;
  int bytes;  // per element
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
