// The emulator's own test kernels: each right, or with one fault planted.
#pragma once

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

}  // namespace faults
