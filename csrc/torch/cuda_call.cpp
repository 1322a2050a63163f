// Runs the CUDA kernels on torch's tensors: device, stream, memory and errors. All memory is
// torch's, in stream order, and nothing waits for the device, so that a CUDA graph can capture a
// call.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/archs.h"
#include "cuda/dispatch.h"
#include "torch/dtypes.h"
#include "torch/ops.h"
#include "torch/plan_text.h"
#include "torch/tensor.h"

// The symbol is weak because the same library loads into a CPU-only torch, which lacks it.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace tvmf {

namespace {

// The compute capabilities that nvcc compiled for, 90 for 9.0.
std::vector<int> compiled_capabilities() {
  std::istringstream archs(cuda_archs());
  std::vector<int> capabilities;
  for (int arch; archs >> arch; archs.ignore()) capabilities.push_back(arch / 10);
  return capabilities;
}

// The same as text, "8.0, 9.0".
std::string compute_capabilities() {
  std::string text;
  for (int capability : compiled_capabilities())
    text += (text.empty() ? "" : ", ") + std::to_string(capability / 10) + "." +
            std::to_string(capability % 10);
  return text;
}

// Writes 13000, as the CUDA runtime numbers its version, as "13.0".
std::string toolkit_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Says what a user can do about an error that comes from how the library was built.
std::string advice(cudaError_t error) {
  const std::string build = " (this build was made with CUDA toolkit " +
                            toolkit_version(CUDART_VERSION) + " for compute capabilities " +
                            compute_capabilities();
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      return build + "; rebuild it with this GPU's in TORCH_CUDA_ARCH_LIST)";
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion: {
      int driver = 0;
      if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
      return build +
             (driver ? "; the driver serves toolkits up to " + toolkit_version(driver)
                     : std::string("; no driver was found")) +
             ". Update the driver, or rebuild with an older toolkit, or with TVMF_CUDA=0 for the "
             "CPU only)";
    }
    default: return "";
  }
}

[[noreturn]] void fail(cudaError_t error, const std::string& what) {
  cudaGetLastError();  // clears the error, which the next caller would otherwise find again
  throw std::runtime_error("tvmf_ext: " + what + " failed: " + cudaGetErrorString(error) +
                           advice(error));
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(error, what);
}

struct Device {
  std::string name;
  Gpu gpu;
  // A kernel that meets a wrong label sets this flag to 1. It lies in host memory that is mapped
  // into the device's address space.
  volatile int* bad_label;
  int* bad_label_on_device;  // the device's address of the same flag
};

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

// The sizes are the device's own. The rates, on which no plan depends, are those of the table where
// it has one of the words of the name. Otherwise they are those of the largest chip of the
// generation, scaled by the number of multiprocessors.
Gpu describe(const std::string& name, int capability, int index) {
  const Gpu* known = nullptr;
  std::istringstream words(name);
  for (std::string word; !known && words >> word;) known = find_gpu(word.substr(0, word.find('-')));
  Gpu gpu = known ? *known : *find_gpu(capability < 90 ? "A100" : "H100");
  const int sms = attribute(cudaDevAttrMultiProcessorCount, index);
  if (!known) {
    const double share = double(sms) / double(gpu.sms);
    gpu.hbm_rate *= share;
    gpu.l2_rate *= share;
    for (double& rate : gpu.flop_rate) rate *= share;
    gpu.cosine_rate *= share;
    gpu.product_rate *= share;
  }
  gpu.sms = sms;
  gpu.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  gpu.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  gpu.l2 = attribute(cudaDevAttrL2CacheSize, index);
  // Without code for its own capability the device runs that of an older one.
  const std::vector<int> compiled = compiled_capabilities();
  const bool own = std::find(compiled.begin(), compiled.end(), capability) != compiled.end();
  gpu.capability = own ? capability : 80;
  return gpu;
}

Device open(int index) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index),
            minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  const std::string name = properties.name;
  if (major < 8)
    throw std::runtime_error(
        "tvmf_ext: the CUDA kernels need compute capability 8.0 or newer, got " +
        std::to_string(major) + "." + std::to_string(minor) + ", " + name +
        "; use the eager functions of tvmf_ext.reference there");
  // The first call may come during the capture of a graph, which forbids allocations by default.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  void *here = nullptr, *there = nullptr;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  cudaError_t error = cudaHostAlloc(&here, sizeof(int), cudaHostAllocMapped);
  if (error == cudaSuccess) error = cudaHostGetDevicePointer(&there, here, 0);
  cudaThreadExchangeStreamCaptureMode(&mode);
  check(error, "cudaHostAlloc");
  *static_cast<int*>(here) = 0;
  return {name, describe(name, 10 * major + minor, index), static_cast<int*>(here),
          static_cast<int*>(there)};
}

// A device is opened at its first use and never closed: a captured graph may hold the address of
// its flag.
const Device& device_at(int index) {
  static std::mutex mutex;
  static std::map<int, Device>& devices = *new std::map<int, Device>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = devices.find(index);
  if (found == devices.end()) found = devices.emplace(index, open(index)).first;
  return found->second;
}

// Makes a device the current one, as long as this object lives, for torch and for the copy of the
// CUDA runtime in this library, which has a current device of its own.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) : guard_(found(index)) {
    check(cudaSetDevice(index), "cudaSetDevice");
  }

 private:
  // Asks for the driver before torch's guard does, whose error would not say what to do.
  static int found(int index) {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    return index;
  }

  torch::stable::accelerator::DeviceGuard guard_;
};

MatrixRef matrix(const Tensor& tensor) {
  return {tensor.data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(1)};
}

VectorRef vector(const OptionalTensor& tensor, double otherwise = 0) {
  if (!tensor) return {nullptr, DType::kFloat32, 0, otherwise};
  return {tensor->data_ptr(), dtype_of(*tensor), tensor->numel() > 1 ? tensor->stride(0) : 0, 0};
}

GradientRef gradient(const Tensor& tensor) {
  return {tensor.numel() > 0 ? tensor.data_ptr() : nullptr, dtype_of(tensor)};
}

// The problem of a call whose weight the kernels read as `weight`, a copy where its dtype differs.
CudaProblem cuda_problem(const Head& head, const Tensor& weight, int64_t kept, bool with_sum) {
  return {.N = head.input.size(0),
          .C = weight.size(0),
          .D = head.input.size(1),
          .x = dtype_of(head.input),
          .given_weight = dtype_of(head.weight),
          .allow_tf32 = head.allow_tf32,
          .kept = kept,
          .with_sum = with_sum,
          .layout = {.row_stride = weight.stride(0),
                     .col_stride = weight.stride(1),
                     .aligned = reinterpret_cast<uintptr_t>(weight.data_ptr()) % 16 == 0}};
}

void raise_for_bad_label(const Device& device, int32_t index) {
  if (!*device.bad_label) return;
  *device.bad_label = 0;
  throw std::out_of_range("an earlier call on cuda:" + std::to_string(index) +
                          " had a target outside [0, C) that is not ignore_index; the loss of "
                          "its row is NaN");
}

// One call: the torch objects that it needs, and its arguments as the kernels take them.
class Call {
 public:
  explicit Call(const Head& head)
      : head_(head),
        index_(head.input.get_device()),
        current_(index_),
        weight_(to_dtype(head.weight, torch_dtype(weight_dtype_read(dtype_of(head.input),
                                                                    dtype_of(head.weight))))),
        kappa_(head.kappa),
        N(head.input.size(0)),
        C(head.weight.size(0)),
        D(head.input.size(1)),
        accumulator(compute_dtype(head.input)) {
    if (N > kMostRows)
      throw std::invalid_argument("input must have at most " + std::to_string(kMostRows) +
                                  " rows on CUDA, got " + std::to_string(N));
    device_ = &device_at(index_);
    raise_for_bad_label(*device_, index_);
    // The kernels take stride 0 for one kappa of all classes, which has one gradient. A tensor [C]
    // that was expanded has stride 0 too, but C gradients.
    if (kappa_ && kappa_->numel() > 1 && kappa_->stride(0) == 0)
      kappa_ = torch::stable::contiguous(*kappa_);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  Call(const Call&) = delete;

  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) const {
    return empty_on(aoti_torch_device_type_cuda(), index_, sizes, dtype);
  }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
  }
  Tensor saved(int64_t kept) const { return empty({SavedLayout(N, C, kept).size}, accumulator); }

  void forward(const LossOptions& options, bool with_sum, int64_t kept, const CudaStatistics& out,
               const Tensor& saved) const {
    const CudaPlan plan = plan_of(kept, with_sum);
    const Tensor workspace = empty({plan.memory.forward}, ScalarType::Byte);
    const cudaError_t error = cuda_forward(plan, {.head = arguments(),
                                                  .options = options,
                                                  .out = out,
                                                  .saved = saved.data_ptr(),
                                                  .workspace = workspace.data_ptr(),
                                                  .stream = stream_});
    if (error != cudaSuccess) fail(error, "the forward pass of " + text());
  }

  Gradients backward(const LossOptions& options, bool with_sum, int64_t kept,
                     const CudaUpstream& upstream, const Tensor& saved, int64_t wanted) const {
    // There is no plan for no rows.
    const std::optional<CudaPlan> plan =
        N > 0 ? std::optional(plan_of(kept, with_sum)) : std::nullopt;
    const auto make = [&](const OptionalTensor& of, int64_t bit) {
      if (!(wanted & bit)) return empty({0}, head_.input.scalar_type());
      const bool added = bit & (kWeight | kKappa | kBias) && plan && plan->adds_gradients();
      return empty(of->sizes(), added ? ScalarType::Float : of->scalar_type());
    };
    Gradients out{make(head_.input, kInput), make(head_.weight, kWeight), make(head_.kappa, kKappa),
                  make(head_.scale, kScale), make(head_.bias, kBias)};
    if (!plan) {
      for (Tensor* each : {&out.weight, &out.kappa, &out.scale, &out.bias})
        torch::stable::zero_(*each);
      return out;
    }
    const Tensor workspace = empty({plan->memory.backward}, ScalarType::Byte);
    const CudaGradients gradients{gradient(out.input), gradient(out.weight), gradient(out.kappa),
                                  gradient(out.scale), gradient(out.bias)};
    const cudaError_t error = cuda_backward(*plan, {.head = arguments(),
                                                    .options = options,
                                                    .upstream = upstream,
                                                    .out = gradients,
                                                    .saved = saved.data_ptr(),
                                                    .workspace = workspace.data_ptr(),
                                                    .stream = stream_});
    if (error != cudaSuccess) fail(error, "the backward pass of " + text());
    if (wanted & kWeight) out.weight = to_dtype(out.weight, head_.weight.scalar_type());
    if (wanted & kKappa) out.kappa = to_dtype(out.kappa, head_.kappa->scalar_type());
    if (wanted & kBias) out.bias = to_dtype(out.bias, head_.bias->scalar_type());
    return out;
  }

 private:
  CudaPlan plan_of(int64_t kept, bool with_sum) const {
    return plan_cuda(cuda_problem(head_, weight_, kept, with_sum), device_->gpu);
  }

  CudaHead arguments() const {
    return {.N = N,
            .C = C,
            .D = D,
            .x = matrix(head_.input),
            .weight = matrix(weight_),
            .target = static_cast<const int64_t*>(head_.target.data_ptr()),
            .target_stride = head_.target.stride(0),
            .kappa = vector(kappa_, head_.kappa_value),
            .scale = vector(head_.scale, head_.scale_value),
            .bias = vector(head_.bias),
            .prior = vector(head_.prior),
            .class_weight = vector(head_.class_weight, 1),
            .cosine_margin = vector(head_.cosine_margin, head_.cosine_margin_value),
            .angular_margin = vector(head_.angular_margin, head_.angular_margin_value),
            .target_score = vector(head_.target_score),
            .softplus_scale = head_.softplus_scale,
            .ignore_index = head_.ignore_index,
            .bad_label = device_->bad_label_on_device};
  }

  std::string text() const {
    std::ostringstream text;
    text << "[N, C, D] = [" << N << ", " << C << ", " << D << "] on cuda:" << index_ << ", "
         << device_->name;
    return text.str();
  }

  const Head& head_;
  int32_t index_;
  CurrentDevice current_;
  Tensor weight_;
  OptionalTensor kappa_;
  const Device* device_;
  cudaStream_t stream_;

 public:
  const int64_t N, C, D;
  const ScalarType accumulator;
};

void* data_or_null(const Tensor& tensor) {
  return tensor.numel() > 0 ? tensor.data_ptr() : nullptr;
}

RowStatistics row_statistics(const Head& head, bool with_sum, int64_t kept) {
  const Call call(head);
  const int64_t N = call.N;
  const ScalarType dtype = call.accumulator;
  const RowStatistics out{.others = call.empty({N}, dtype),
                          .cosine = call.empty({N}, dtype),
                          .sum = call.empty({with_sum ? N : 0}, dtype),
                          .rank = call.empty({N}, ScalarType::Long),
                          .saved = call.saved(kept)};
  if (N > 0)
    call.forward({0, Reduction::kNone}, with_sum, kept,
                 {.others = out.others.data_ptr(),
                  .cosine = out.cosine.data_ptr(),
                  .sum = data_or_null(out.sum),
                  .rank = static_cast<int64_t*>(out.rank.data_ptr()),
                  .loss = nullptr},
                 out.saved);
  return out;
}

Gradients row_statistics_backward(const Head& head, const StatisticsGradients& gradients,
                                  int64_t kept, const Tensor& saved, int64_t wanted) {
  const Call call(head);
  return call.backward({0, Reduction::kNone}, gradients.sum.has_value(), kept,
                       {.loss = vector({}),
                        .others = vector(gradients.others),
                        .cosine = vector(gradients.cosine),
                        .sum = vector(gradients.sum)},
                       saved, wanted);
}

Loss cross_entropy(const Head& head, const LossOptions& options, int64_t kept) {
  const Call call(head);
  const bool reduced = options.reduction != Reduction::kNone;
  Loss out{
      .loss = reduced ? call.empty({}, call.accumulator) : call.empty({call.N}, call.accumulator),
      .saved = call.saved(kept)};
  if (call.N > 0) {
    call.forward(options, options.label_smoothing > 0, kept,
                 {.others = nullptr,
                  .cosine = nullptr,
                  .sum = nullptr,
                  .rank = nullptr,
                  .loss = out.loss.data_ptr()},
                 out.saved);
  } else if (reduced) {
    const bool mean = options.reduction == Reduction::kMean;
    torch::stable::fill_(out.loss, mean ? std::numeric_limits<double>::quiet_NaN() : 0.0);
  }
  return out;
}

Gradients cross_entropy_backward(const Head& head, const LossOptions& options,
                                 const Tensor& grad_loss, int64_t kept, const Tensor& saved,
                                 int64_t wanted) {
  const Call call(head);
  return call.backward(
      options, options.label_smoothing > 0, kept,
      {.loss = vector(grad_loss), .others = vector({}), .cosine = vector({}), .sum = vector({})},
      saved, wanted);
}

}  // namespace

const Backend kCudaBackend{.row_statistics = row_statistics,
                           .row_statistics_backward = row_statistics_backward,
                           .cross_entropy = cross_entropy,
                           .cross_entropy_backward = cross_entropy_backward};

const Gpu& cuda_gpu(int32_t device) {
  const CurrentDevice current(device);
  return device_at(device).gpu;
}

void check_targets(int64_t number) {
  const int32_t device = static_cast<int32_t>(number);
  const CurrentDevice current(device);
  raise_for_bad_label(device_at(device), device);
}

}  // namespace tvmf
