#include "torch/plan_text.h"

#include <torch/csrc/stable/ops.h>

#include "cpu/choice.h"
#include "cpu/panel_call.h"
#include "cpu/plan.h"
#include "cuda/plan.h"
#include "torch/check.h"
#include "torch/dtypes.h"

namespace tvmf {
namespace {

DType dtype_named(const std::string& name) {
  const DTypeEntry* entry = find_dtype(name);
  TVMF_CHECK(entry, "dtype must be ", kDTypeNames, ", got ", name);
  return entry->dtype;
}

// "cuda:0" names a device of this machine, everything else a GPU of the table.
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

// "key=value;key=value;"
class Fields {
 public:
  Fields() { text_.precision(17); }
  template <class T>
  void put(const std::string& key, const T& value) {
    text_ << key << "=" << value << ";";
  }
  std::string text() const { return text_.str(); }

 private:
  std::ostringstream text_;
};

std::string cpu_text(int64_t N, int64_t C, int64_t D, DType x, int64_t kept) {
  const int64_t element_size = size_of(x) == 8 ? 8 : 4;
  const auto own = cpu::own_products(torch_dtype(x), N, C, D);
  CpuPlan plan = plan_cpu(N, C, D, element_size);
  int64_t workspace = N * std::min(plan.class_block, C) * element_size;
  if (own) {
    const int64_t threads = torch::stable::get_num_threads();
    const cpu::PanelPlan panels(N, C, D, threads);
    plan = {.class_block = panels.wave, .row_group = cpu::kPanel, .stripe = panels.block};
    workspace = cpu::panel_workspace(N, C, D, own->per_element, kept, threads);
  }
  Fields fields;
  fields.put("architecture", "cpu");
  fields.put("own_products", int(own != nullptr));
  fields.put("class_block", plan.class_block);
  fields.put("row_group", plan.row_group);
  fields.put("stripe", plan.stripe);
  fields.put("workspace", workspace);
  fields.put("kept", kept);
  fields.put("saved", SavedLayout(N, C, kept).size * element_size);
  return fields.text();
}

}  // namespace

std::string plan_text(int64_t N, int64_t C, int64_t D, std::string dtype, std::string weight_dtype,
                      bool allow_tf32, int64_t kept, bool with_sum, std::string device) {
  TVMF_CHECK(N >= 1 && C >= 1 && D >= 1, "N, C and D must be at least 1, got ", N, ", ", C, ", ",
             D);
  TVMF_CHECK(kept >= 0, "kept must be at least 0, got ", kept);
  const DType x = dtype_named(dtype), weight = dtype_named(weight_dtype);
  if (device == "cpu") return cpu_text(N, C, D, x, kept);

  TVMF_CHECK(N <= kMostRows, "N must be at most ", kMostRows, " on CUDA, got ", N);
  const Gpu gpu = gpu_named(device);
  const CudaProblem problem{.N = N,
                            .C = C,
                            .D = D,
                            .x = x,
                            .given_weight = weight,
                            .allow_tf32 = allow_tf32,
                            .kept = kept,
                            .with_sum = with_sum,
                            .layout = {.row_stride = D, .col_stride = 1}};
  const CudaPlan plan = plan_cuda(problem, gpu);
  Fields fields;
  fields.put("gpu", gpu.name);
  fields.put("sms", gpu.sms);
  fields.put("hbm_rate", gpu.hbm_rate);
  fields.put("l2_rate", gpu.l2_rate);
  fields.put("launch_seconds", gpu.launch_seconds);
  fields.put("weight_copy", problem.weight() == weight ? 0 : C * D * size_of(problem.weight()));
  for (const PlanField& field : fields_of(plan, gpu))
    std::visit([&](const auto& value) { fields.put(field.name, value); }, field.value);
  return fields.text();
}

std::tuple<int64_t, int64_t, int64_t> kept_products(int64_t C, int64_t D, std::string dtype,
                                                    std::string weight_dtype, int64_t row_stride,
                                                    int64_t col_stride, bool aligned,
                                                    std::string device) {
  TVMF_CHECK(C >= 1 && D >= 1, "C and D must be at least 1, got ", C, ", ", D);
  const CudaProblem problem{
      .N = 1,
      .C = C,
      .D = D,
      .x = dtype_named(dtype),
      .given_weight = dtype_named(weight_dtype),
      .allow_tf32 = false,
      .kept = 0,
      .with_sum = false,
      .layout = {.row_stride = row_stride, .col_stride = col_stride, .aligned = aligned}};
  const KeptProducts kept = tvmf::kept_products(problem, gpu_named(device));
  return {kept.most_rows, kept.row_multiple, kept.beside};
}

}  // namespace tvmf
