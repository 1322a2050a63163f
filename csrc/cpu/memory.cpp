#include "cpu/memory.h"

#include <algorithm>

#include "problem.h"

#ifdef __linux__
#include <sys/mman.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif
#endif

namespace tvmf::cpu {

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

Tensor populated(const Tensor& tensor) {
#ifdef MADV_POPULATE_WRITE
  constexpr int64_t kPage = 4096, kPiece = int64_t(1) << 22;
  const auto begin = round_up(reinterpret_cast<int64_t>(tensor.data_ptr()), kPage);
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size()) - kPage;
  if (bytes >= 2 * kPiece)
    torch::stable::parallel_for(0, ceil_div(bytes, kPiece), 1, [&](int64_t first, int64_t last) {
      const int64_t from = first * kPiece, to = std::min(last * kPiece, bytes / kPage * kPage);
      // An older kernel, to which this advice is unknown, leaves the pages to be faulted in.
      madvise(reinterpret_cast<void*>(begin + from), to - from, MADV_POPULATE_WRITE);
    });
#endif
  return tensor;
}

}  // namespace tvmf::cpu
