// The backward pass on the CPU: from gradients of the row statistics to those of the head.
#pragma once

#include <vector>

#include "cpu/call.h"
#include "torch/ops.h"

namespace tvmf::cpu {

template <class T>
struct Upstream {
  std::vector<RowGradient<T>> rows;  // [N]
  bool with_sum;                     // whether the rows' `sum` is to be looked at
};

template <class T>
Gradients backward(const Call<T>& call, const Saved<const T>& saved, const Upstream<T>& upstream,
                   int64_t wanted);

}  // namespace tvmf::cpu
