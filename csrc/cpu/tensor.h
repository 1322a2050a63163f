// torch's tensors on the CPU: allocation, conversion, and the matrix products of torch's library.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>

#include "torch/ops.h"

namespace tvmf {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;

template <class T>
constexpr ScalarType kDtype = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// The tensor, with its memory populated.
Tensor populated(const Tensor& tensor);

// Operators that torch/csrc/stable/ops.h of torch 2.11 does not wrap; all return one tensor.
template <class... Args>
Tensor call_dispatcher(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A strided view of memory: rows x cols, element (i, j) at data[i * row_stride + j * col_stride].
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, row_stride, col_stride = 1;

  T& operator()(int64_t i, int64_t j) const { return data[i * row_stride + j * col_stride]; }
  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
  Tensor tensor() const {
    const std::array<int64_t, 2> sizes{rows, cols}, strides{row_stride, col_stride};
    return torch::stable::from_blob(const_cast<std::remove_const_t<T>*>(data), sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    kDtype<std::remove_const_t<T>>);
  }
};

// out = a b, or out += a b
template <class T>
void matmul(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, bool add = false);

// The rows of a tensor in the compute dtype with unit column stride. This is a view where the
// tensor has that form already; otherwise blocks of rows are converted into one buffer.
template <class T>
class Rows {
 public:
  Rows(const Tensor& tensor, int64_t max_rows)
      : tensor_(tensor),
        direct_(tensor.scalar_type() == kDtype<T> &&
                (tensor.size(1) == 1 || tensor.stride(1) == 1) &&
                (tensor.size(0) == 1 || tensor.stride(0) >= tensor.size(1))) {
    if (!direct_) buffer_ = empty({max_rows, tensor.size(1)}, kDtype<T>);
  }

  bool direct() const { return direct_; }

  Matrix<T> block(int64_t begin, int64_t count) {
    const int64_t D = tensor_.size(1);
    if (direct_) {
      // A tensor of one row may carry any stride, and BLAS wants at least the row's length.
      const int64_t ld = std::max(tensor_.stride(0), D);
      return {data<T>(tensor_) + begin * ld, count, D, ld};
    }
    Tensor out = torch::stable::narrow(*buffer_, 0, 0, count);
    Tensor in = tensor_;
    torch::stable::copy_(out, torch::stable::narrow(in, 0, begin, count));
    return {data<T>(*buffer_), count, D, D};
  }

 private:
  Tensor tensor_;
  bool direct_;
  std::optional<Tensor> buffer_;
};

}  // namespace tvmf
