// Operators that run csrc/torch/cuda_call.cpp, the host code of the CUDA path, on CPU tensors: the
// functions of torch that it calls for a GPU are replaced by those for a CPU, and the CUDA runtime
// and the kernels are the emulator's. So its allocations can be counted without a GPU.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cuda/archs.h"
#include "torch/ops.h"

void bind_runtime(pybind11::module_& module);

extern "C" {
int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
}

namespace tvmf {

const char* cuda_archs() { return "800,900"; }

namespace {

std::tuple<Tensor, Tensor> cross_entropy(TVMF_HEAD_PARAMETERS double label_smoothing,
                                         int64_t reduction, int64_t kept) {
  const Loss out = kCudaBackend.cross_entropy(
      {TVMF_HEAD(TVMF_AS_ARGUMENT)}, {label_smoothing, static_cast<Reduction>(reduction)}, kept);
  return {out.loss, out.saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_backward(
    Tensor grad_loss, TVMF_HEAD_PARAMETERS double label_smoothing, int64_t reduction, int64_t kept,
    Tensor saved, int64_t wanted) {
  const Gradients out = kCudaBackend.cross_entropy_backward(
      {TVMF_HEAD(TVMF_AS_ARGUMENT)}, {label_smoothing, static_cast<Reduction>(reduction)},
      grad_loss, kept, saved, wanted);
  return {out.input, out.weight, out.kappa, out.scale, out.bias};
}

STABLE_TORCH_LIBRARY(tvmf_emulated, m) {
  m.def("cross_entropy(" TVMF_HEAD_SCHEMA
        "float label_smoothing, int reduction, int kept) -> (Tensor, Tensor)");
  m.def("cross_entropy_backward(Tensor grad_loss, " TVMF_HEAD_SCHEMA
        "float label_smoothing, int reduction, int kept, Tensor saved, int wanted)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tvmf_emulated, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace
}  // namespace tvmf

PYBIND11_MODULE(simt_torch, module) { bind_runtime(module); }
