#include "cpu/product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <array>

namespace tvmf::cpu {
namespace {

const torch::stable::Device kDevice(torch::headeronly::DeviceType::CPU);

template <class T>
Tensor tensor_of(const Matrix<T>& matrix) {
  const std::array<int64_t, 2> sizes{matrix.rows, matrix.cols},
      strides{matrix.row_stride, matrix.col_stride};
  return torch::stable::from_blob(matrix.data, sizes, strides, kDevice, kDtype<T>);
}

// torch/csrc/stable/ops.h of torch 2.11 does not wrap aten::index_select.
Tensor select_rows(const Tensor& tensor, const Tensor& index) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(tensor), from(int64_t(0)), from(index)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

template <class T>
void matmul(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, bool add) {
  // Two thousand multiply-adds take less time than a call of the library.
  if (out.rows * out.cols * a.cols <= 2048) {
    for (int64_t i = 0; i < out.rows; ++i)
      for (int64_t j = 0; j < out.cols; ++j) {
        T total = add ? out(i, j) : T(0);
        for (int64_t k = 0; k < a.cols; ++k) total += a(i, k) * b(k, j);
        out(i, j) = total;
      }
    return;
  }
  const Tensor to = tensor_of(out), left = tensor_of(a), right = tensor_of(b);
  TORCH_ERROR_CODE_CHECK(
      add ? aoti_torch_cpu_addmm_out(to.get(), to.get(), left.get(), right.get(), 1, 1)
          : aoti_torch_cpu_mm_out(to.get(), left.get(), right.get()));
}

template <class T>
Rows<T>::Rows(const Tensor& tensor, int64_t max_rows)
    : tensor_(tensor),
      direct_(tensor.scalar_type() == kDtype<T> && (tensor.size(1) == 1 || tensor.stride(1) == 1) &&
              (tensor.size(0) == 1 || tensor.stride(0) >= tensor.size(1))) {
  if (!direct_) buffer_ = empty({max_rows, tensor.size(1)}, kDtype<T>);
}

template <class T>
Matrix<T> Rows<T>::block(int64_t begin, int64_t count) {
  const int64_t D = tensor_.size(1);
  if (direct_) {
    // A tensor of one row may have any stride; BLAS wants at least the length of the row.
    const int64_t row_stride = std::max(tensor_.stride(0), D);
    return {data<T>(tensor_) + begin * row_stride, count, D, row_stride};
  }
  Tensor out = torch::stable::narrow(*buffer_, 0, 0, count);
  Tensor in = tensor_;
  torch::stable::copy_(out, torch::stable::narrow(in, 0, begin, count));
  return {data<T>(*buffer_), count, D, D};
}

template <class T>
Tensor Rows<T>::gathered(int64_t* indices, int64_t count) const {
  const std::array<int64_t, 1> sizes{count}, strides{1};
  const Tensor index = torch::stable::from_blob(indices, sizes, strides, kDevice, ScalarType::Long);
  return to_dtype(select_rows(tensor_, index), kDtype<T>);
}

template void matmul(const Matrix<float>&, const Matrix<float>&, const Matrix<float>&, bool);
template void matmul(const Matrix<double>&, const Matrix<double>&, const Matrix<double>&, bool);
template class Rows<float>;
template class Rows<double>;

}  // namespace tvmf::cpu
