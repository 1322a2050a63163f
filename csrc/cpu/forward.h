// The forward pass on the CPU: row statistics of the logits.
#pragma once

#include "cpu/call.h"

namespace tvmf::cpu {

// Where the forward pass writes.
template <class T>
struct Statistics {
  Saved<T> saved;
  T* sum;         // [N]  sum_{c != y} class_weight_c z_nc; null where it is not wanted
  int64_t* rank;  // [N]  classes that score above the target; -1 for an ignored row
};

template <class T>
void forward(const Call<T>& call, const Statistics<T>& out);

}  // namespace tvmf::cpu
