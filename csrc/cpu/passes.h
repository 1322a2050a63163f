// The two passes on the CPU. T is float, or double for float64 features.
#pragma once

#include "cpu/blocks.h"
#include "cpu/terms.h"

namespace tvmf {

// Writes `saved` (SavedLayout), and each row's target logit, its sum where `with_sum`, and its
// rank: each [N].
template <class T>
void make_statistics(const Problem<T>& problem, bool with_sum, int64_t kept, T* saved, T* target,
                     T* sum, int64_t* rank);

// The gradients of the rows' statistics, each [N].
template <class T>
struct RowUpstream {
  std::vector<T> lse, target, sum;
};

// The gradients that `wanted` names (GradBits), in the dtypes of their tensors.
template <class T>
Gradients make_gradients(const Problem<T>& problem, const T* saved, int64_t kept,
                         const RowUpstream<T>& upstream, bool with_sum, int64_t wanted);

}  // namespace tvmf
