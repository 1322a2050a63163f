// Conversions and memory of torch that both devices use.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>

namespace tvmf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor to_dtype(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  return torch::stable::to(tensor, dtype);
}

// The dtype of statistics, losses and accumulations.
inline ScalarType compute_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An uninitialised contiguous tensor of at most two dimensions. It calls torch's C function
// directly, because the way through the dispatcher takes longer than a small head.
inline Tensor empty_on(int32_t device_type, int32_t device_index,
                       torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::array<int64_t, 2> strides{1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(sizes[1], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

}  // namespace tvmf
