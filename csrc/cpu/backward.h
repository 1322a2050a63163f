// The backward pass on the CPU: from gradients of the row statistics to those of the head.
#pragma once

#include <vector>

#include "cpu/call.h"
#include "torch/ops.h"

namespace tvmf::cpu {

// Gradients of each row's statistics, [N].
template <class T>
struct Upstream {
  std::vector<T> lse, target, sum;
  bool with_sum;  // whether `sum` is to be looked at
};

template <class T>
Gradients backward(const Call<T>& call, const Saved<const T>& saved, const Upstream<T>& upstream,
                   int64_t wanted);

}  // namespace tvmf::cpu
