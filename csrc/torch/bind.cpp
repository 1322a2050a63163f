// The operators: their schemas, the checks of their arguments, and their registration through
// PyTorch's stable ABI; and the empty Python module whose import loads them.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <sstream>
#include <tuple>
#include <utility>

#include "cpu/isa.h"
#include "cuda/archs.h"
#include "loss.h"
#include "torch/check.h"
#include "torch/dtypes.h"
#include "torch/ops.h"
#include "torch/plan_text.h"
#include "torch/tensor.h"

namespace tvmf {
namespace {

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

// Python's name of the dtype; torch's own, such as ComplexFloat, for what is seldom passed.
std::string dtype(const Tensor& tensor) {
  if (const DTypeEntry* entry = find_dtype(tensor.scalar_type())) return entry->name;
  switch (tensor.scalar_type()) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(tensor.scalar_type());
  }
}

void check_device(const char* name, const Tensor& tensor, const Tensor& input) {
  TVMF_CHECK(tensor.is_cpu() == input.is_cpu() && tensor.get_device() == input.get_device(), name,
             " must be on the input's device, ", device(input), ", got ", device(tensor));
}

void check_tensor(const char* name, const Tensor& tensor, const Tensor& input) {
  TVMF_CHECK(find_dtype(tensor.scalar_type()), name, " must be ", kDTypeNames, ", got ",
             dtype(tensor));
  check_device(name, tensor, input);
}

bool is_one_value(const Tensor& tensor) {
  return tensor.dim() == 0 || (tensor.dim() == 1 && tensor.size(0) == 1);
}

// One value per class, or with `or_one` also one value for all classes.
void check_per_class(const char* name, const OptionalTensor& tensor, const Tensor& input, int64_t C,
                     bool or_one) {
  if (!tensor) return;
  check_tensor(name, *tensor, input);
  TVMF_CHECK((or_one && is_one_value(*tensor)) || (tensor->dim() == 1 && tensor->size(0) == C),
             name, " must have shape ", or_one ? "[], [1] or " : "", "[C] = [", C, "], got ",
             shape(*tensor));
}

// Checks the values of kappa and the margins as far as they are numbers. On the CPU HeadTerms
// checks those of tensors.
void check_margins(const Head& head) {
  const bool given = !head.cosine_margin && !head.angular_margin;
  const double m = head.cosine_margin ? 0 : head.cosine_margin_value,
               a = head.angular_margin ? 0 : head.angular_margin_value;
  TVMF_CHECK(m >= 0 && std::isfinite(m), "cosine_margin must be finite and >= 0, got ", m);
  TVMF_CHECK(a >= 0 && a <= kLargestAngle, "angular_margin must be in [0, pi], got ", a);
  if (head.kappa) return;
  TVMF_CHECK(head.kappa_value > -0.5 && std::isfinite(head.kappa_value),
             "kappa must be finite and > -1/2, got ", head.kappa_value);
  TVMF_CHECK(!given || head.kappa_value > smallest_kappa(m, a), "kappa must be > ",
             smallest_kappa(m, a), " with these margins, got ", head.kappa_value);
}

// The messages name the arguments as the Python functions do.
void check_head(const Head& head) {
  const Tensor &input = head.input, &weight = head.weight, &target = head.target;
  TVMF_CHECK(input.dim() == 2, "input must have shape [N, D], got ", shape(input),
             input.dim() > 2 ? "; pass input.flatten(0, -2) and target.flatten()" : "");
  TVMF_CHECK(weight.dim() == 2, "linear_weight must have shape [C, D], got ", shape(weight));
  TVMF_CHECK(target.dim() == 1, "target must have shape [N], got ", shape(target),
             target.dim() == 2 ? "; for soft targets use cross_entropy over tvmf_logits" : "");
  check_tensor("input", input, input);
  check_tensor("linear_weight", weight, input);
  TVMF_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64, got ", dtype(target));
  check_device("target", target, input);
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
  check_per_class("cosine_margin", head.cosine_margin, input, C, true);
  check_per_class("angular_margin", head.angular_margin, input, C, true);
  if (head.target_score) {
    const Tensor& score = *head.target_score;
    check_device("target_score", score, input);
    TVMF_CHECK(score.dim() == 1 && score.size(0) == input.size(0) &&
                   score.scalar_type() == compute_dtype(input),
               "target_score must be [N] = [", input.size(0), "] of the compute dtype, got ",
               shape(score), " of ", dtype(score));
  }
  if (head.scale) {
    check_tensor("scale", *head.scale, input);
    TVMF_CHECK(is_one_value(*head.scale), "scale must have shape [] or [1], got ",
               shape(*head.scale));
  }
  check_margins(head);
  TVMF_CHECK(head.scale || (head.scale_value > 0 && std::isfinite(head.scale_value)),
             "scale must be finite and > 0, got ", head.scale_value);
}

Head checked(Head head) {
  check_head(head);
  return head;
}

LossOptions checked_loss(const Head& head, double label_smoothing, int64_t reduction) {
  TVMF_CHECK(!head.target_score, "target_score must be None for a loss, which needs all classes");
  TVMF_CHECK(label_smoothing >= 0 && label_smoothing <= 1,
             "label_smoothing must be in [0, 1], got ", label_smoothing);
  TVMF_CHECK(reduction >= 0 && reduction <= 2,
             "reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  return {label_smoothing, static_cast<Reduction>(reduction)};
}

// How many classes have their products kept; on CUDA how many elements of each row, since Hopper's
// kernels keep rounded weights as well.
int64_t checked_kept(const Head& head, int64_t kept) {
  const int64_t C = head.weight.size(0), every = round_up(C, kPad);
  const int64_t most = head.input.is_cpu() ? every : round_up(C * (32 + head.input.size(1)), kPad);
  TVMF_CHECK(kept >= 0 && kept % kPad == 0 && kept <= most, "kept must be a multiple of ", kPad,
             " from 0 to ", most, ", got ", kept);
  TVMF_CHECK(head.input.is_cpu() || kept == 0 || kept >= every, "kept must be 0 or at least ",
             every, " on CUDA, got ", kept);
  return kept;
}

// Bit i of `wanted` asks for gradient i.
void check_wanted(const Head& head, int64_t wanted) {
  TVMF_CHECK(wanted >= 0 && wanted < 32, "wanted must be five bits, got ", wanted);
  const auto check_present = [wanted](const char* name, const OptionalTensor& tensor, int64_t bit) {
    TVMF_CHECK(tensor || !(wanted & bit), "wanted asks for the gradient of ", name,
               ", which is absent, got ", wanted);
  };
  check_present("kappa", head.kappa, kKappa);
  check_present("scale", head.scale, kScale);
  check_present("bias", head.bias, kBias);
}

// Autograd passes what the forward pass returned. A direct caller may pass anything.
void check_saved(const Head& head, int64_t kept, const Tensor& saved, int64_t wanted) {
  checked_kept(head, kept);
  check_wanted(head, wanted);
  check_tensor("saved", saved, head.input);
  const int64_t size = SavedLayout(head.input.size(0), head.weight.size(0), kept).size;
  TVMF_CHECK(saved.dim() == 1 && saved.size(0) == size &&
                 saved.scalar_type() == compute_dtype(head.input) &&
                 (size < 2 || saved.stride(0) == 1),
             "saved must be what the forward pass returned, [", size, "], got ", shape(saved),
             " of ", dtype(saved));
}

void check_upstream(const char* name, const OptionalTensor& gradient, const Head& head,
                    bool reduced) {
  if (!gradient) return;
  check_tensor(name, *gradient, head.input);
  TVMF_CHECK(reduced ? gradient->dim() == 0
                     : gradient->dim() == 1 && gradient->size(0) == head.input.size(0),
             name, " must have shape ", reduced ? "[]" : "[N]", ", got ", shape(*gradient));
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five in_order(const Gradients& gradients) {
  return {gradients.input, gradients.weight, gradients.kappa, gradients.scale, gradients.bias};
}

#define TVMF_CHECKED_HEAD checked({TVMF_HEAD(TVMF_AS_ARGUMENT)})

template <const Backend& kBackend>
Five row_statistics(TVMF_HEAD_PARAMETERS bool with_sum, int64_t kept) {
  const Head head = TVMF_CHECKED_HEAD;
  const RowStatistics out = kBackend.row_statistics(head, with_sum, checked_kept(head, kept));
  return {out.others, out.cosine, out.sum, out.rank, out.saved};
}

template <const Backend& kBackend>
Five row_statistics_backward(OptionalTensor grad_others, OptionalTensor grad_cosine,
                             OptionalTensor grad_sum, TVMF_HEAD_PARAMETERS int64_t kept,
                             Tensor saved, int64_t wanted) {
  const Head head = TVMF_CHECKED_HEAD;
  check_saved(head, kept, saved, wanted);
  check_upstream("grad_others", grad_others, head, false);
  check_upstream("grad_cosine", grad_cosine, head, false);
  check_upstream("grad_sum", grad_sum, head, false);
  return in_order(kBackend.row_statistics_backward(head, {grad_others, grad_cosine, grad_sum}, kept,
                                                   saved, wanted));
}

template <const Backend& kBackend>
std::tuple<Tensor, Tensor> cross_entropy(TVMF_HEAD_PARAMETERS double label_smoothing,
                                         int64_t reduction, int64_t kept) {
  const Head head = TVMF_CHECKED_HEAD;
  const Loss out = kBackend.cross_entropy(head, checked_loss(head, label_smoothing, reduction),
                                          checked_kept(head, kept));
  return {out.loss, out.saved};
}

template <const Backend& kBackend>
Five cross_entropy_backward(Tensor grad_loss, TVMF_HEAD_PARAMETERS double label_smoothing,
                            int64_t reduction, int64_t kept, Tensor saved, int64_t wanted) {
  const Head head = TVMF_CHECKED_HEAD;
  const LossOptions options = checked_loss(head, label_smoothing, reduction);
  check_saved(head, kept, saved, wanted);
  check_upstream("grad_loss", grad_loss, head, options.reduction != Reduction::kNone);
  return in_order(kBackend.cross_entropy_backward(head, options, grad_loss, kept, saved, wanted));
}

template <const Backend& kBackend, class Library>
void implement(Library& m) {
  m.impl("row_statistics", TORCH_BOX(&row_statistics<kBackend>));
  m.impl("row_statistics_forward", TORCH_BOX(&row_statistics<kBackend>));
  m.impl("row_statistics_backward", TORCH_BOX(&row_statistics_backward<kBackend>));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy<kBackend>));
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy<kBackend>));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward<kBackend>));
}

// "key=value;...": the instruction set, the compute capabilities that nvcc compiled for or the
// reason why it did not run, and the oldest torch that the binary runs with.
std::string build_info() {
  std::ostringstream text;
  text << "cpu=" << cpu::capability() << ";cuda_archs=";
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

#define TVMF_GRADIENTS_SCHEMA                                                          \
  " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_kappa, Tensor grad_scale, " \
  "Tensor grad_bias)"

#define TVMF_STATISTICS_SCHEMA  \
  "(" TVMF_HEAD_SCHEMA          \
  "bool with_sum, SymInt kept)" \
  " -> (Tensor others, Tensor cosine, Tensor sum, Tensor rank, Tensor saved)"
#define TVMF_LOSS_SCHEMA \
  "(" TVMF_HEAD_SCHEMA   \
  "float label_smoothing, int reduction, SymInt kept) -> (Tensor loss, Tensor saved)"

STABLE_TORCH_LIBRARY(tvmf_ext, m) {
  // Python registers gradients with the operators that a program records. Eager code calls the
  // ones that end in _forward, because a small head would feel the way through those gradients.
  m.def("row_statistics" TVMF_STATISTICS_SCHEMA);
  m.def("row_statistics_forward" TVMF_STATISTICS_SCHEMA);
  m.def("cross_entropy" TVMF_LOSS_SCHEMA);
  m.def("cross_entropy_forward" TVMF_LOSS_SCHEMA);
  m.def(
      "row_statistics_backward(Tensor? grad_others, Tensor? grad_cosine, Tensor? "
      "grad_sum, " TVMF_HEAD_SCHEMA "SymInt kept, Tensor saved, int wanted)" TVMF_GRADIENTS_SCHEMA);
  m.def("cross_entropy_backward(Tensor grad_loss, " TVMF_HEAD_SCHEMA
        "float label_smoothing, int reduction, SymInt kept, Tensor saved, int "
        "wanted)" TVMF_GRADIENTS_SCHEMA);
  m.def("build_info() -> str");
  m.def(
      "plan(int N, int C, int D, str dtype, str weight_dtype, bool allow_tf32, int kept, "
      "bool with_sum, str device) -> str");
  m.def(
      "kept_products(int C, int D, str dtype, str weight_dtype, int row_stride, int col_stride, "
      "bool aligned, str device) -> (int, int, int)");
  m.def("check_targets(int device) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tvmf_ext, CPU, m) { implement<kCpuBackend>(m); }
#ifdef TVMF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(tvmf_ext, CUDA, m) { implement<kCudaBackend>(m); }
#endif

STABLE_TORCH_LIBRARY_IMPL(tvmf_ext, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("plan", TORCH_BOX(&plan_text));
  m.impl("kept_products", TORCH_BOX(&kept_products));
#ifdef TVMF_WITH_CUDA
  m.impl("check_targets", TORCH_BOX(&check_targets));
#endif
}

}  // namespace
}  // namespace tvmf

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
