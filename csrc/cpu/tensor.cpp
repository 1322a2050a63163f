#include "cpu/tensor.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#ifdef __linux__
#include <sys/mman.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif
#endif

namespace tvmf {

// Large tensors come as untouched pages. All threads together ask for the pages in less than half
// of the time that a matrix product would lose by faulting on them one by one.
Tensor populated(const Tensor& tensor) {
#ifdef MADV_POPULATE_WRITE
  constexpr int64_t kPage = 4096, kChunk = int64_t(1) << 22;
  const auto begin = round_up(reinterpret_cast<int64_t>(tensor.data_ptr()), kPage);
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size()) - kPage;
  if (bytes >= 2 * kChunk)
    parallel_for(0, ceil_div(bytes, kChunk), 1, [&](int64_t first, int64_t last) {
      const int64_t from = first * kChunk, to = std::min(last * kChunk, bytes / kPage * kPage);
      // An operating system that does not know this advice faults the pages in later.
      madvise(reinterpret_cast<void*>(begin + from), to - from, MADV_POPULATE_WRITE);
    });
#endif
  return tensor;
}

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
  const Tensor to = out.tensor(), left = a.tensor(), right = b.tensor();
  TORCH_ERROR_CODE_CHECK(
      add ? aoti_torch_cpu_addmm_out(to.get(), to.get(), left.get(), right.get(), 1, 1)
          : aoti_torch_cpu_mm_out(to.get(), left.get(), right.get()));
}
template void matmul(const Matrix<float>&, const Matrix<float>&, const Matrix<float>&, bool);
template void matmul(const Matrix<double>&, const Matrix<double>&, const Matrix<double>&, bool);

}  // namespace tvmf
