#include "cpu/call.h"

#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace tvmf::cpu {
namespace {

std::vector<int64_t> read_labels(const Head& head) {
  const int64_t N = head.target.size(0), C = head.weight.size(0);
  const int64_t stride = N > 0 ? head.target.stride(0) : 1;
  const int64_t* target = data<int64_t>(head.target);
  std::vector<int64_t> label(N);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t y = target[n * stride];
    label[n] = label_of(y, head.ignore_index, C, head.target_score.has_value());
    if (label[n] == kWrong)
      throw std::out_of_range("target[" + std::to_string(n) + "] is " + std::to_string(y) +
                              ", wanted a class in [0, " + std::to_string(C) +
                              ") or ignore_index " + std::to_string(head.ignore_index));
  }
  return label;
}

}  // namespace

template <class T>
Call<T>::Call(const Head& head)
    : head(head),
      N(head.input.size(0)),
      C(head.weight.size(0)),
      D(head.input.size(1)),
      own_products(cpu::own_products(head.input.scalar_type(), N, C, D)),
      plan(plan_cpu(N, C, D, sizeof(T))),
      terms(head),
      label(read_labels(head)) {}

void block_columns(const std::vector<int64_t>& label, const Block& block, int64_t* column) {
  for (size_t n = 0; n < label.size(); ++n) {
    const int64_t c = label[n] - block.begin;
    column[n] = c >= 0 && c < block.count ? c : -1;
  }
}

template <class T>
void block_product(const Matrix<T>& x, const Matrix<T>& weight, const Block& block, T* product) {
  matmul<T>({product, x.rows, block.count, block.stride}, x, weight.transposed());
  for (int64_t n = 0; n < x.rows; ++n) {
    T* row = product + n * block.stride;
    std::fill(row + block.count, row + block.stride, T(0));
  }
}

template <class T>
void rnorm(const Matrix<T>& rows, T* out) {
  parallel_rows(rows.rows, rows.cols, [&](int64_t begin, int64_t end) {
    tile_kernels<T>().rnorm(rows.data + begin * rows.row_stride, rows.row_stride, end - begin,
                            rows.cols, out + begin);
  });
}

template struct Call<float>;
template struct Call<double>;
template void block_product(const Matrix<float>&, const Matrix<float>&, const Block&, float*);
template void block_product(const Matrix<double>&, const Matrix<double>&, const Block&, double*);
template void rnorm(const Matrix<float>&, float*);
template void rnorm(const Matrix<double>&, double*);

}  // namespace tvmf::cpu
