// Memory of the CPU path, as tensors of torch.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "torch/tensor.h"

namespace tvmf::cpu {

template <class T>
constexpr ScalarType kDtype = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Uninitialised and contiguous.
Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype);
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype);

// The same tensor, with its pages populated by all threads together where it is large. A new large
// tensor has pages that no one has touched, and a matrix product that faults on them one by one
// loses more than twice the time that this takes.
Tensor populated(const Tensor& tensor);

}  // namespace tvmf::cpu
