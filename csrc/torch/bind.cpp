// Operator schemas, argument checks and registration through PyTorch's stable ABI, and the empty
// Python module whose import loads them.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "cpu/tile.h"
#include "cuda/archs.h"
#include "similarity.h"
#include "torch/check.h"
#include "torch/ops.h"
#include "torch/plan_text.h"

namespace tvmf {

namespace {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

std::string device(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device());
  return "another device";
}

// As Python spells it, for what is likely to be passed by mistake.
const char* dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return torch::headeronly::toString(tensor.scalar_type());
  }
}

void check_tensor(const char* name, const Tensor& tensor, const Tensor& input) {
  const ScalarType type = tensor.scalar_type();
  TVMF_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                 type == ScalarType::BFloat16 || type == ScalarType::Half,
             name, " must be float16, bfloat16, float32 or float64, got ", dtype(tensor));
  TVMF_CHECK(tensor.is_cpu() == input.is_cpu() && tensor.get_device() == input.get_device(), name,
             " must be on the input's device, ", device(input), ", got ", device(tensor));
}

// An argument of one value per class, or of one for all where `or_one`.
void check_per_class(const char* name, const OptionalTensor& tensor, const Tensor& input, int64_t C,
                     bool or_one) {
  if (!tensor) return;
  check_tensor(name, *tensor, input);
  const bool one = tensor->dim() == 0 || (tensor->dim() == 1 && tensor->size(0) == 1);
  TVMF_CHECK((or_one && one) || (tensor->dim() == 1 && tensor->size(0) == C), name,
             " must have shape ", or_one ? "[], [1] or " : "", "[C] = [", C, "], got ",
             shape(*tensor));
}

// Checks the arguments that all operators share.
void check_head(const Head& head) {
  const Tensor &input = head.input, &weight = head.weight, &target = head.target;
  TVMF_CHECK(input.dim() == 2, "input must have shape [N, D], got ", shape(input));
  TVMF_CHECK(weight.dim() == 2, "linear_weight must have shape [C, D], got ", shape(weight));
  TVMF_CHECK(target.dim() == 1, "target must have shape [N], got ", shape(target));
  check_tensor("input", input, input);
  check_tensor("linear_weight", weight, input);
  TVMF_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64, got ", dtype(target));
  TVMF_CHECK(target.is_cpu() == input.is_cpu() && target.get_device() == input.get_device(),
             "target must be on the input's device, ", device(input), ", got ", device(target));
  TVMF_CHECK(input.size(1) == weight.size(1),
             "input [N, D] and linear_weight [C, D] must agree in D, got ", shape(input), " and ",
             shape(weight));
  TVMF_CHECK(input.size(1) >= 1, "input must have at least one feature, got ", shape(input));
  TVMF_CHECK(weight.size(0) >= 1, "linear_weight must have at least one class, got ",
             shape(weight));
  TVMF_CHECK(target.size(0) == input.size(0), "input [N, D] and target [N] must agree in N, got ",
             shape(input), " and ", shape(target));
  const int64_t C = weight.size(0);
  check_per_class("kappa", head.kappa, input, C, true);
  check_per_class("linear_bias", head.bias, input, C, false);
  check_per_class("prior", head.prior, input, C, false);
  check_per_class("weight", head.class_weight, input, C, false);
  if (const OptionalTensor& scale = head.scale) {
    check_tensor("scale", *scale, input);
    TVMF_CHECK(scale->dim() == 0 || (scale->dim() == 1 && scale->size(0) == 1),
               "scale must have shape [] or [1], got ", shape(*scale));
  }
  TVMF_CHECK(head.kappa || (head.kappa_value > -0.5 && std::isfinite(head.kappa_value)),
             "kappa must be finite and > -1/2, got ", head.kappa_value);
  TVMF_CHECK(head.scale || (head.scale_value > 0 && std::isfinite(head.scale_value)),
             "scale must be finite and > 0, got ", head.scale_value);
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five in_order(const Gradients& out) {
  return {out.input, out.weight, out.kappa, out.scale, out.bias};
}

// A direct caller's mistakes; autograd passes what the forward pass returned.
void check_backward(const Head& head, const Tensor& saved, int64_t kept,
                    std::initializer_list<std::pair<const char*, const OptionalTensor*>> grads,
                    bool reduced) {
  check_tensor("saved", saved, head.input);
  const int64_t N = head.input.size(0), C = head.weight.size(0);
  const ScalarType wanted =
      head.input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  TVMF_CHECK(saved.numel() == SavedLayout(N, C, kept).size && saved.scalar_type() == wanted &&
                 (saved.numel() < 2 || saved.stride(0) == 1),
             "saved must be what the forward pass returned, [", SavedLayout(N, C, kept).size,
             "], got ", shape(saved), " of ", dtype(saved));
  for (const auto& grad : grads) {
    if (!*grad.second) continue;
    check_tensor(grad.first, **grad.second, head.input);
    TVMF_CHECK(reduced ? (*grad.second)->dim() == 0
                       : (*grad.second)->dim() == 1 && (*grad.second)->size(0) == N,
               grad.first, " must have shape ", reduced ? "[]" : "[N]", ", got ",
               shape(**grad.second));
  }
}

// The kernels of one device.
struct Backend {
  decltype(&cpu_row_statistics) row_statistics;
  decltype(&cpu_row_statistics_backward) row_statistics_backward;
  decltype(&cpu_cross_entropy) cross_entropy;
  decltype(&cpu_cross_entropy_backward) cross_entropy_backward;
};
constexpr Backend kCpu{cpu_row_statistics, cpu_row_statistics_backward, cpu_cross_entropy,
                       cpu_cross_entropy_backward};
#ifdef TVMF_WITH_CUDA
constexpr Backend kCuda{cuda_row_statistics, cuda_row_statistics_backward, cuda_cross_entropy,
                        cuda_cross_entropy_backward};
#endif

template <const Backend& kBackend>
Five row_statistics(TVMF_HEAD_PARAMETERS bool with_sum, int64_t kept) {
  const Head head{TVMF_HEAD(TVMF_AS_ARGUMENT)};
  check_head(head);
  const auto out = kBackend.row_statistics(head, with_sum, kept);
  return {out.lse, out.target, out.sum, out.rank, out.saved};
}

template <const Backend& kBackend>
Five row_statistics_backward(OptionalTensor grad_lse, OptionalTensor grad_target,
                             OptionalTensor grad_sum, TVMF_HEAD_PARAMETERS int64_t kept,
                             Tensor saved, int64_t wanted) {
  const Head head{TVMF_HEAD(TVMF_AS_ARGUMENT)};
  check_head(head);
  check_backward(head, saved, kept,
                 {{"grad_lse", &grad_lse}, {"grad_target", &grad_target}, {"grad_sum", &grad_sum}},
                 false);
  return in_order(
      kBackend.row_statistics_backward(head, saved, kept, grad_lse, grad_target, grad_sum, wanted));
}

LossOptions checked_loss(double label_smoothing, int64_t reduction) {
  TVMF_CHECK(label_smoothing >= 0 && label_smoothing <= 1,
             "label_smoothing must be in [0, 1], got ", label_smoothing);
  return {label_smoothing, static_cast<Reduction>(reduction)};
}

template <const Backend& kBackend>
std::tuple<Tensor, Tensor> cross_entropy(TVMF_HEAD_PARAMETERS double label_smoothing,
                                         int64_t reduction, int64_t kept) {
  const Head head{TVMF_HEAD(TVMF_AS_ARGUMENT)};
  check_head(head);
  const auto out = kBackend.cross_entropy(head, checked_loss(label_smoothing, reduction), kept);
  return {out.loss, out.saved};
}

template <const Backend& kBackend>
Five cross_entropy_backward(Tensor grad_loss, TVMF_HEAD_PARAMETERS double label_smoothing,
                            int64_t reduction, int64_t kept, Tensor saved, int64_t wanted) {
  const Head head{TVMF_HEAD(TVMF_AS_ARGUMENT)};
  check_head(head);
  const LossOptions options = checked_loss(label_smoothing, reduction);
  const OptionalTensor grad = grad_loss;
  check_backward(head, saved, kept, {{"grad_loss", &grad}}, options.reduction != Reduction::kNone);
  return in_order(kBackend.cross_entropy_backward(head, options, saved, kept, grad_loss, wanted));
}

template <const Backend& kBackend, class Library>
void implement(Library& m) {
  m.impl("row_statistics", TORCH_BOX(&row_statistics<kBackend>));
  m.impl("row_statistics_backward", TORCH_BOX(&row_statistics_backward<kBackend>));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy<kBackend>));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward<kBackend>));
}

std::string build_info() {
  std::ostringstream text;
  text << "cpu=" << cpu_capability() << ";cuda_archs=";
#ifdef TVMF_WITH_CUDA
  text << cuda_archs();
#endif
  text << ";stable_abi=" << (TORCH_TARGET_VERSION >> 56) << "."
       << ((TORCH_TARGET_VERSION >> 48) & 0xff);
#ifndef TVMF_WITH_CUDA
  text << ";no_cuda=" << TVMF_NO_CUDA;
#endif
  return text.str();
}

STABLE_TORCH_LIBRARY(tvmf_ext, m) {
  m.def("row_statistics(" TVMF_HEAD_SCHEMA
        "bool with_sum, SymInt kept)"
        " -> (Tensor lse, Tensor target_logit, Tensor sum, Tensor rank, Tensor saved)");
  m.def(
      "row_statistics_backward(Tensor? grad_lse, Tensor? grad_target, Tensor? "
      "grad_sum, " TVMF_HEAD_SCHEMA
      "SymInt kept, Tensor saved, int wanted)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cross_entropy(" TVMF_HEAD_SCHEMA
        "float label_smoothing, int reduction, SymInt kept)"
        " -> (Tensor loss, Tensor saved)");
  m.def("cross_entropy_backward(Tensor grad_loss, " TVMF_HEAD_SCHEMA
        "float label_smoothing, int reduction, SymInt kept, Tensor saved, int wanted)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("build_info() -> str");
  m.def(
      "plan(int N, int C, int D, str dtype, str weight_dtype, bool allow_tf32, int kept, "
      "bool with_sum, str device) -> str");
  m.def(
      "keeps_products(int C, int D, str dtype, str weight_dtype, int row_stride, int col_stride, "
      "bool aligned, str device) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(tvmf_ext, CPU, m) { implement<kCpu>(m); }
#ifdef TVMF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(tvmf_ext, CUDA, m) { implement<kCuda>(m); }
#endif

STABLE_TORCH_LIBRARY_IMPL(tvmf_ext, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("plan", TORCH_BOX(&plan_text));
  m.impl("keeps_products", TORCH_BOX(&keeps_products));
}

}  // namespace
}  // namespace tvmf

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
