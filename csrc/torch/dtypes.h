// The dtypes of features and parameters that the kernels take: their names, and torch's numbers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

#include "problem.h"

namespace tvmf {

struct DTypeEntry {
  const char* name;  // Python's
  DType dtype;
  torch::headeronly::ScalarType scalar_type;
};

constexpr DTypeEntry kDTypes[] = {
    {"float16", DType::kFloat16, torch::headeronly::ScalarType::Half},
    {"bfloat16", DType::kBFloat16, torch::headeronly::ScalarType::BFloat16},
    {"float32", DType::kFloat32, torch::headeronly::ScalarType::Float},
    {"float64", DType::kFloat64, torch::headeronly::ScalarType::Double},
};
constexpr const char* kDTypeNames = "float16, bfloat16, float32 or float64";

// Null where the kernels do not take such a dtype.
inline const DTypeEntry* find_dtype(torch::headeronly::ScalarType scalar_type) {
  for (const DTypeEntry& entry : kDTypes)
    if (entry.scalar_type == scalar_type) return &entry;
  return nullptr;
}
inline const DTypeEntry* find_dtype(const std::string& name) {
  for (const DTypeEntry& entry : kDTypes)
    if (entry.name == name) return &entry;
  return nullptr;
}

// For tensors that have been checked.
inline DType dtype_of(const torch::stable::Tensor& tensor) {
  return find_dtype(tensor.scalar_type())->dtype;
}
inline torch::headeronly::ScalarType torch_dtype(DType dtype) {
  return kDTypes[int32_t(dtype)].scalar_type;
}

}  // namespace tvmf
