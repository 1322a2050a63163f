// Matrix products by PyTorch's library, on strided views of memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "cpu/memory.h"

namespace tvmf::cpu {

// rows x cols elements, of which (i, j) is data[i * row_stride + j * col_stride].
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, row_stride, col_stride = 1;

  T& operator()(int64_t i, int64_t j) const { return data[i * row_stride + j * col_stride]; }
  Matrix transposed() const {
    return {.data = data,
            .rows = cols,
            .cols = rows,
            .row_stride = col_stride,
            .col_stride = row_stride};
  }
};

// out = a b, or with `add` out += a b. Instantiated for float and double.
template <class T>
void matmul(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, bool add = false);

// The rows of a matrix in the compute dtype T with unit column stride. They are a view of the
// tensor where it is already so; otherwise a block of at most `max_rows` rows at a time is
// converted into one buffer.
template <class T>
class Rows {
 public:
  Rows(const Tensor& tensor, int64_t max_rows);

  bool direct() const { return direct_; }
  // Valid until the next call, unless direct().
  Matrix<T> block(int64_t begin, int64_t count);
  // The given rows as a new tensor in the compute dtype.
  Tensor gathered(int64_t* indices, int64_t count) const;

 private:
  Tensor tensor_;
  bool direct_;
  std::optional<Tensor> buffer_;
};

}  // namespace tvmf::cpu
