// The backward pass on the CPU: from gradients of the row statistics to those of the head.
#pragma once

#include <vector>

#include "cpu/call.h"
#include "similarity.h"
#include "torch/ops.h"

namespace tvmf::cpu {

template <class T>
struct Upstream {
  std::vector<RowGradient<T>> rows;  // [N]
  bool with_sum;                     // whether the rows' `sum` is to be looked at
};

// The factor of the row v in the projection of its gradient, dot / |v|^2, with its sign. A row
// shorter than eps is divided by a constant, and so has no projection.
template <class T>
inline T projection(T dot, T rnorm) {
  return rnorm < T(1 / kEps) ? -dot * rnorm * rnorm : T(0);
}

template <class T>
Gradients backward(const Call<T>& call, const Saved<const T>& saved, const Upstream<T>& upstream,
                   int64_t wanted);

}  // namespace tvmf::cpu
