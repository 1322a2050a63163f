// Operator schemas, argument checks and registration through PyTorch's stable ABI, and the empty
// Python module whose import loads them.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "cpu/plan.h"
#include "cpu/tile.h"
#include "similarity.h"
#include "torch/ops.h"

namespace tvmf {

#ifdef TVMF_WITH_CUDA
const char* cuda_archs();
#endif

namespace {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

// std::invalid_argument is a ValueError in Python, std::out_of_range an IndexError.
template <class... Args>
[[noreturn]] void fail(const Args&... message) {
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

// The message is built only if it is needed: a small head would feel it.
#define TVMF_CHECK(ok, ...) \
  if (!(ok)) fail(__VA_ARGS__)

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

Head checked(Tensor input, Tensor weight, Tensor target, OptionalTensor kappa, double kappa_value,
             OptionalTensor scale, double scale_value, bool softplus_scale, OptionalTensor bias,
             OptionalTensor prior, OptionalTensor class_weight, int64_t ignore_index,
             bool allow_tf32) {
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
  check_per_class("kappa", kappa, input, C, true);
  check_per_class("linear_bias", bias, input, C, false);
  check_per_class("prior", prior, input, C, false);
  check_per_class("weight", class_weight, input, C, false);
  if (scale) {
    check_tensor("scale", *scale, input);
    TVMF_CHECK(scale->dim() == 0 || (scale->dim() == 1 && scale->size(0) == 1),
               "scale must have shape [] or [1], got ", shape(*scale));
  }
  TVMF_CHECK(kappa || (kappa_value > -0.5 && std::isfinite(kappa_value)),
             "kappa must be finite and > -1/2, got ", kappa_value);
  TVMF_CHECK(scale || (scale_value > 0 && std::isfinite(scale_value)),
             "scale must be finite and > 0, got ", scale_value);
  return {input,          weight, target, kappa,        kappa_value,  scale,     scale_value,
          softplus_scale, bias,   prior,  class_weight, ignore_index, allow_tf32};
}

#define TVMF_HEAD_SCHEMA                                                                 \
  "Tensor input, Tensor weight, Tensor target, Tensor? kappa, float kappa_value, "       \
  "Tensor? scale, float scale_value, bool softplus_scale, Tensor? bias, Tensor? prior, " \
  "Tensor? class_weight, int ignore_index, bool allow_tf32"
#define TVMF_HEAD_PARAMS                                                                  \
  Tensor input, Tensor weight, Tensor target, OptionalTensor kappa, double kappa_value,   \
      OptionalTensor scale, double scale_value, bool softplus_scale, OptionalTensor bias, \
      OptionalTensor prior, OptionalTensor class_weight, int64_t ignore_index, bool allow_tf32
#define TVMF_HEAD                                                                              \
  checked(input, weight, target, kappa, kappa_value, scale, scale_value, softplus_scale, bias, \
          prior, class_weight, ignore_index, allow_tf32)

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
Five row_statistics(TVMF_HEAD_PARAMS, bool with_sum, int64_t kept) {
  const auto out = kBackend.row_statistics(TVMF_HEAD, with_sum, kept);
  return {out.lse, out.target, out.sum, out.rank, out.saved};
}

template <const Backend& kBackend>
Five row_statistics_backward(OptionalTensor grad_lse, OptionalTensor grad_target,
                             OptionalTensor grad_sum, TVMF_HEAD_PARAMS, int64_t kept, Tensor saved,
                             int64_t wanted) {
  const Head head = TVMF_HEAD;
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
std::tuple<Tensor, Tensor> cross_entropy(TVMF_HEAD_PARAMS, double label_smoothing,
                                         int64_t reduction, int64_t kept) {
  const auto out =
      kBackend.cross_entropy(TVMF_HEAD, checked_loss(label_smoothing, reduction), kept);
  return {out.loss, out.saved};
}

template <const Backend& kBackend>
Five cross_entropy_backward(Tensor grad_loss, TVMF_HEAD_PARAMS, double label_smoothing,
                            int64_t reduction, int64_t kept, Tensor saved, int64_t wanted) {
  const Head head = TVMF_HEAD;
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

DType dtype_named(const std::string& name) {
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float32") return DType::kFloat32;
  TVMF_CHECK(name == "float64", "dtype must be float16, bfloat16, float32 or float64, got ", name);
  return DType::kFloat64;
}

// A name of the table, or "cuda:0": one that is here.
Gpu gpu_named(const std::string& device) {
  if (const Gpu* gpu = find_gpu(device)) return *gpu;
  TVMF_CHECK(device.rfind("cuda:", 0) == 0, "device must be cpu, cuda or one of ", gpu_names(),
             ", got ", device);
#ifdef TVMF_WITH_CUDA
  return cuda_gpu(std::stoi(device.substr(5)));
#else
  fail("device must be cpu or one of ", gpu_names(), " in a build without CUDA, got ", device);
#endif
}

// What a call would do: `key=value;...` of a plan's fields, and what its prediction is made of.
std::string plan(int64_t N, int64_t C, int64_t D, std::string dtype_name, std::string weight_dtype,
                 bool allow_tf32, int64_t kept, bool with_sum, std::string device) {
  TVMF_CHECK(N >= 1 && C >= 1 && D >= 1, "N, C and D must be at least 1, got ", N, ", ", C, ", ",
             D);
  TVMF_CHECK(kept >= 0, "kept must be at least 0, got ", kept);
  const DType x = dtype_named(dtype_name), weight = dtype_named(weight_dtype);
  std::ostringstream text;
  text.precision(17);
  const auto put = [&](const char* key, auto value) { text << key << "=" << value << ";"; };
  if (device == "cpu") {
    const int64_t element_size = size_of(x) == 8 ? 8 : 4;
    const CpuPlan plan = plan_cpu(N, C, D, element_size);
    put("class_block", plan.class_block);
    put("row_group", plan.row_group);
    put("stripe", plan.stripe);
    put("kept", kept);
    put("saved", SavedLayout(N, C, kept).size * element_size);
    return text.str();
  }
  const Gpu gpu = gpu_named(device);
  const DType read = cuda_weight_dtype(x, weight);
  const bool bulk = weight == DType::kFloat32 && D % 4 == 0;  // as torch makes it
  CudaPlan plan =
      plan_cuda({N, C, D, x, read, allow_tf32, cuda_kept(C, kept), with_sum, bulk}, gpu);
  // Hopper's kernels multiply again; tvmf_ext.functional keeps nothing for them.
  if (plan.hopper.used) plan = plan_cuda({N, C, D, x, read, allow_tf32, 0, with_sum, bulk}, gpu);
  const char* const math[] = {"float16", "bfloat16", "TF32", "float32", "float64"};
  put("gpu", gpu.name);
  put("sms", gpu.sms);
  put("hbm_rate", gpu.hbm_rate);
  put("l2_rate", l2_rate(plan, gpu));
  put("flop_rate", flop_rate(plan, gpu));
  put("launch_seconds", gpu.launch_seconds);
  put("weight_copy", read == weight ? 0 : C * D * size_of(read));
  put("kept", plan.problem.kept);
  put("math", math[static_cast<int>(plan.math)]);
  put("hopper", plan.hopper.used);
  put("latency", plan.latency);
  put("tile", plan.tile);
  put("row_tiles", plan.row_tiles);
  put("class_splits", plan.class_splits);
  put("tiles_per_split", plan.tiles_per_split);
  put("class_tile", plan.hopper.used ? plan.hopper.few ? 64 : 128 : 0);
  put("row_blocks", plan.hopper.row_blocks);
  put("class_tiles", plan.hopper.class_tiles);
  put("walkers", plan.hopper.walkers);
  put("gradient_walkers", plan.hopper.gradient_walkers);
  put("chunk", plan.chunk);
  put("chunks", plan.chunks);
  put("resident", plan.resident);
  put("row_groups", plan.row_groups);
  put("feature_splits", plan.feature_splits);
  put("input_tile", plan.hopper.used ? kHopperProductRows : plan.input_tile);
  put("input_splits", plan.input_splits);
  put("forward_launches", plan.forward_launches);
  put("backward_launches", plan.backward_launches);
  put("forward_workspace", plan.forward_workspace);
  put("backward_workspace", plan.backward_workspace);
  put("saved", plan.saved);
  put("forward_flops", plan.forward_flops);
  put("backward_flops", plan.backward_flops);
  put("forward_hbm", plan.forward_hbm);
  put("backward_hbm", plan.backward_hbm);
  put("forward_l2", plan.forward_l2);
  put("backward_l2", plan.backward_l2);
  put("forward_seconds", plan.forward_seconds);
  put("backward_seconds", plan.backward_seconds);
  return text.str();
}

STABLE_TORCH_LIBRARY(tvmf_ext, m) {
  m.def("row_statistics(" TVMF_HEAD_SCHEMA
        ", bool with_sum, SymInt kept)"
        " -> (Tensor lse, Tensor target_logit, Tensor sum, Tensor rank, Tensor saved)");
  m.def(
      "row_statistics_backward(Tensor? grad_lse, Tensor? grad_target, Tensor? "
      "grad_sum, " TVMF_HEAD_SCHEMA
      ", SymInt kept, Tensor saved, int wanted)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cross_entropy(" TVMF_HEAD_SCHEMA
        ", float label_smoothing, int reduction, SymInt kept)"
        " -> (Tensor loss, Tensor saved)");
  m.def("cross_entropy_backward(Tensor grad_loss, " TVMF_HEAD_SCHEMA
        ", float label_smoothing, int reduction, SymInt kept, Tensor saved, int wanted)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("build_info() -> str");
  m.def(
      "plan(int N, int C, int D, str dtype, str weight_dtype, bool allow_tf32, int kept, "
      "bool with_sum, str device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tvmf_ext, CPU, m) { implement<kCpu>(m); }
#ifdef TVMF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(tvmf_ext, CUDA, m) { implement<kCuda>(m); }
#endif

STABLE_TORCH_LIBRARY_IMPL(tvmf_ext, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("plan", TORCH_BOX(&plan));
}

}  // namespace
}  // namespace tvmf

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
