// Python's functions for the emulated kernels: one forward and backward pass on NumPy arrays. Every
// buffer has exactly the extent that the operators give it, so that accesses beyond it are found.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/dispatch.h"
#include "simt.h"

namespace py = pybind11;
using namespace tvmf;

void bind_runtime(py::module_& module);
void bind_faults(py::module_& module);

namespace {

// NumPy has no bfloat16, so both 16-bit dtypes come as arrays of uint16, and `dtype` names the one.
struct Typed {
  py::array array;
  DType dtype;
};

DType dtype_of(const std::string& name) {
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  throw std::invalid_argument("dtype must be float16, bfloat16, float32 or float64, got " + name);
}

// Reads a pair (array, name of its dtype).
Typed typed(const py::handle& pair) {
  const auto tuple = pair.cast<py::tuple>();
  return {tuple[0].cast<py::array>(), dtype_of(tuple[1].cast<std::string>())};
}

// Copies the memory between the array's first and last element, which keeps its strides.
void* copy_in(const char* name, const py::array& array) {
  int64_t last = 0;
  for (int i = 0; i < array.ndim(); ++i) last += (array.shape(i) - 1) * array.strides(i);
  const size_t bytes = last + array.itemsize();
  void* memory = simt::allocate(name, bytes);
  std::memcpy(memory, array.data(), bytes);
  return memory;
}

MatrixRef matrix(const char* name, const Typed& value) {
  const int64_t size = size_of(value.dtype);
  return {copy_in(name, value.array), value.dtype, value.array.strides(0) / size,
          value.array.strides(1) / size};
}

// Reads a number, or an array of one value, or of one value per row. `absent` stands for None.
VectorRef vector(const char* name, const py::dict& from, const char* key, double absent) {
  if (!from.contains(key) || from[key].is_none()) return {nullptr, DType::kFloat32, 0, absent};
  const py::handle value = from[key];
  if (py::isinstance<py::float_>(value)) return {nullptr, DType::kFloat32, 0, value.cast<double>()};
  const Typed t = typed(value);
  const int64_t stride = t.array.ndim() ? t.array.strides(0) / size_of(t.dtype) : 0;
  return {copy_in(name, t.array), t.dtype, stride, 0};
}

py::array copy_out(const void* memory, DType dtype, std::vector<int64_t> shape) {
  const py::dtype types[] = {py::dtype::of<uint16_t>(), py::dtype::of<uint16_t>(),
                             py::dtype::of<float>(), py::dtype::of<double>()};
  py::array out(types[int(dtype)], std::vector<py::ssize_t>(shape.begin(), shape.end()));
  std::memcpy(out.mutable_data(), memory, out.nbytes());
  return out;
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

Gpu gpu_of(const py::dict& args) {
  Gpu gpu = *find_gpu("H200");
  if (args.contains("sms")) gpu.sms = args["sms"].cast<int64_t>();
  if (args.contains("shared_per_block"))
    gpu.shared_per_block = args["shared_per_block"].cast<int64_t>();
  if (args.contains("l2")) gpu.l2 = args["l2"].cast<int64_t>();
  if (args.contains("shared_per_sm")) gpu.shared_per_sm = args["shared_per_sm"].cast<int64_t>();
  gpu.capability = args.contains("capability") ? args["capability"].cast<int>() : 80;
  return gpu;
}

// Offers to keep what the kernels want to, as tvmf_ext/head.py does but for its limits.
void offer_to_keep(CudaProblem& problem, const Gpu& gpu) {
  const KeptProducts keeps = kept_products(problem, gpu);
  if (problem.N <= keeps.most_rows) problem.kept = keeps.elements(problem.N, problem.C);
}

// Returns outputs and gradients by name. `upstream` holds the gradients of the loss or, of the
// statistics, those of lse, target and sum.
py::dict step(const py::dict& args) {
  simt::release_all();
  const Typed x = typed(args["input"]), w = typed(args["linear_weight"]);
  const int64_t N = x.array.shape(0), D = x.array.shape(1), C = w.array.shape(0);
  const DType compute = x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t acc = size_of(compute);
  const bool of_loss = args["of_loss"].cast<bool>();
  const LossOptions options{args["label_smoothing"].cast<double>(),
                            Reduction(args["reduction"].cast<int64_t>())};
  const bool reduced = options.reduction != Reduction::kNone;

  const auto target = args["target"].cast<py::array_t<int64_t>>();
  int* bad_label = static_cast<int*>(simt::allocate("bad_label", sizeof(int)));
  *bad_label = 0;
  const CudaHead head{.N = N,
                      .C = C,
                      .D = D,
                      .x = matrix("input", x),
                      .weight = matrix("weight", w),
                      .target = static_cast<int64_t*>(copy_in("target", target)),
                      .target_stride = target.strides(0) / 8,
                      .kappa = vector("kappa", args, "kappa", 0),
                      .scale = vector("scale", args, "scale", 1),
                      .bias = vector("bias", args, "linear_bias", 0),
                      .prior = vector("prior", args, "prior", 0),
                      .class_weight = vector("class_weight", args, "weight", 1),
                      .cosine_margin = vector("cosine_margin", args, "cosine_margin", 0),
                      .angular_margin = vector("angular_margin", args, "angular_margin", 0),
                      .target_score = vector("target_score", args, "target_score", 0),
                      .softplus_scale = args["softplus_scale"].cast<bool>(),
                      .ignore_index = args["ignore_index"].cast<int64_t>(),
                      .bad_label = bad_label};
  CudaProblem problem{
      .N = N,
      .C = C,
      .D = D,
      .x = x.dtype,
      .given_weight = w.dtype,
      .allow_tf32 = args["allow_tf32"].cast<bool>(),
      .kept = 0,
      .with_sum = !of_loss || options.label_smoothing > 0,
      .layout = {.row_stride = head.weight.row_stride,
                 .col_stride = head.weight.col_stride,
                 .aligned = reinterpret_cast<uintptr_t>(head.weight.data) % 16 == 0}};
  if (problem.weight() != w.dtype)
    throw std::invalid_argument("the kernels do not read a weight of this dtype");
  const Gpu gpu = gpu_of(args);
  if (args["kept"].cast<bool>()) offer_to_keep(problem, gpu);
  CudaPlan plan = plan_cuda(problem, gpu);
  if (args.contains("most_rows")) {
    const auto split = sm90::make_plan(problem, gpu, args["most_rows"].cast<int64_t>());
    plan = {problem, split, memory_of(problem, split)};
  }
  py::dict out;
  const auto output = [&](const char* name, int64_t count, int64_t size) {
    return simt::allocate(name, count * size);
  };
  void* saved = output("saved", plan.memory.saved, 1);
  CudaStatistics statistics{};
  if (of_loss) {
    statistics.loss = output("loss", reduced ? 1 : N, acc);
  } else {
    statistics.others = output("others", N, acc);
    statistics.cosine = output("cosine", N, acc);
    statistics.sum = output("sum", N, acc);
    statistics.rank = static_cast<int64_t*>(output("rank", N, 8));
  }
  check(cuda_forward(plan, {.head = head,
                            .options = options,
                            .out = statistics,
                            .saved = saved,
                            .workspace = output("forward_workspace", plan.memory.forward, 1),
                            .stream = nullptr}));
  if (of_loss) {
    out["loss"] = copy_out(statistics.loss, compute,
                           reduced ? std::vector<int64_t>{} : std::vector<int64_t>{N});
  } else {
    out["others"] = copy_out(statistics.others, compute, {N});
    out["cosine"] = copy_out(statistics.cosine, compute, {N});
    out["sum"] = copy_out(statistics.sum, compute, {N});
    py::array_t<int64_t> rank(N);
    std::memcpy(rank.mutable_data(), statistics.rank, N * 8);
    out["rank"] = rank;
  }
  out["bad_label"] = *bad_label != 0;

  const auto wanted = args["wanted"].cast<std::vector<std::string>>();
  const auto is_wanted = [&](const char* name) {
    return std::find(wanted.begin(), wanted.end(), name) != wanted.end();
  };
  std::vector<std::tuple<const char*, GradientRef, std::vector<int64_t>>> gradients;
  const auto gradient = [&](const char* name, const char* buffer, DType dtype,
                            std::vector<int64_t> shape) -> GradientRef {
    if (!is_wanted(name)) return {nullptr, dtype};
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    const GradientRef ref{output(buffer, count, size_of(dtype)), dtype};
    gradients.emplace_back(name, ref, shape);
    return ref;
  };
  const std::vector<int64_t> kappa_shape =
      head.kappa.stride ? std::vector<int64_t>{C} : std::vector<int64_t>{};
  const auto of_class = [&](DType dtype) {
    return plan.adds_gradients() ? DType::kFloat32 : dtype;
  };
  const CudaGradients grads{gradient("input", "dx", x.dtype, {N, D}),
                            gradient("linear_weight", "dw", of_class(w.dtype), {C, D}),
                            gradient("kappa", "dkappa", of_class(head.kappa.dtype), kappa_shape),
                            gradient("scale", "dscale", head.scale.dtype, {}),
                            gradient("linear_bias", "dbias", of_class(head.bias.dtype), {C})};
  if (!gradients.empty()) {
    const auto from = args["upstream"].cast<py::dict>();
    CudaUpstream upstream{vector("dloss", from, "loss", 0), vector("dothers", from, "others", 0),
                          vector("dcosine", from, "cosine", 0), vector("dsum", from, "sum", 0)};
    const auto* bytes = static_cast<const unsigned char*>(saved);
    const std::vector<unsigned char> before(bytes, bytes + plan.memory.saved);
    check(cuda_backward(plan, {.head = head,
                               .options = options,
                               .upstream = upstream,
                               .out = grads,
                               .saved = saved,
                               .workspace = output("backward_workspace", plan.memory.backward, 1),
                               .stream = nullptr}));
    if (std::memcmp(before.data(), bytes, before.size()) != 0)
      throw std::runtime_error("the backward pass has changed what the forward pass saved");
  }
  py::dict by_name;
  for (const auto& [name, ref, shape] : gradients)
    by_name[name] = copy_out(ref.data, ref.dtype, shape);
  out["gradients"] = by_name;

  py::dict planned;
  for (const PlanField& field : fields_of(plan, gpu)) planned[field.name.c_str()] = field.value;
  out["plan"] = planned;
  return out;
}

// A problem with bfloat16 features and a float32 weight.
CudaProblem mixed_problem(int64_t N, int64_t C, int64_t D) {
  return {.N = N,
          .C = C,
          .D = D,
          .x = DType::kBFloat16,
          .given_weight = DType::kFloat32,
          .allow_tf32 = false,
          .kept = 0,
          .with_sum = false,
          .layout = {.row_stride = D, .col_stride = 1}};
}

// The predicted times of the two products as the kernels made them that were measured: in a launch
// each, whose tiles or runs of 2 steps and more the multiprocessors shared in whole waves.
std::map<std::string, double> products_in_two_launches(const CudaProblem& p, const sm90::Plan& plan,
                                                       const Gpu& gpu) {
  const double N = double(p.N), D = double(p.D), wait = gpu.wait_seconds;
  const double step = 2.0 * sm90::kProductRows * sm90::kProductCols * sm90::kDepth /
                      (gpu.product_rate / double(gpu.sms));
  const double ends = (KernelCost::kStart + KernelCost::kTile) * wait + gpu.launch_seconds;
  const int64_t cols = ceil_div(p.D, sm90::kProductCols);
  const int64_t tiles = ceil_div(p.N, sm90::kProductRows) * cols;
  const int64_t splits = std::clamp<int64_t>(
      std::min(gpu.sms / tiles, 16 * kMiB / std::max<int64_t>(p.N * p.D * 4, 1)), 1,
      std::max<int64_t>(ceil_div(plan.chunk, sm90::kDepth) / 2, 1));
  const bool cached = 2 * double(plan.chunk) * (N + 3 * D) <= double(gpu.l2 * 7 / 10);
  double weight = 0, features = 0;
  for (int64_t begin = 0; begin < p.C; begin += plan.chunk) {
    const int64_t classes = std::min(plan.chunk, p.C - begin);
    const double count = double(classes), read = cached ? 0 : 2 * count * (N + D);
    const double waves =
        double(ceil_div(ceil_div(classes, sm90::kProductRows) * cols, plan.blocks));
    const double written = count * D * 4 / gpu.hbm_rate;
    weight += ends + std::max(waves * double(ceil_div(p.N, sm90::kDepth)) * step +
                                  (waves - 1) * KernelCost::kTile * wait + written,
                              written + read / gpu.hbm_rate);
    const double steps = double(ceil_div(ceil_div(classes, sm90::kDepth), splits));
    const double rounds = double(ceil_div(tiles * splits, plan.blocks));
    const double added = double(splits) * N * D * 4 * (begin > 0 ? 2 : 1) / gpu.l2_rate;
    features += ends + std::max(steps * rounds * step + added, read / gpu.hbm_rate);
  }
  return {{"weight_gradient", weight}, {"feature_gradient", features}};
}

// Predicted seconds of each kernel, by its name, of one step with bfloat16 features and a float32
// weight on an H200, if the epilogues of the cosines have so many instructions an element, a chunk
// so many classes, and each of the products a launch of its own.
std::map<std::string, double> hopper_seconds(int64_t N, int64_t C, int64_t D, int64_t chunk,
                                             double statistics, double gradient) {
  const CudaProblem problem = mixed_problem(N, C, D);
  const Gpu& gpu = *find_gpu("H200");
  sm90::Plan plan = sm90::make_plan(problem, gpu);
  plan.chunk = chunk;
  plan.chunks = ceil_div(C, chunk);
  const Cost cost = cost_of(problem, plan, gpu, {statistics, gradient});
  std::map<std::string, double> seconds = products_in_two_launches(problem, plan, gpu);
  for (const PassCost* pass : {&cost.forward, &cost.backward})
    for (const KernelCost& kernel : pass->kernels)
      if (std::string(kernel.name) != "products") seconds[kernel.name] = kernel.seconds;
  return seconds;
}

// The schedule of a chunk's products: what it comes to, and for each block its tiles of dw, its
// steps of the tiles of dx, and its turn.
py::dict product_schedule(int64_t rows, int64_t D, int64_t classes, int64_t sms,
                          int64_t most_partials) {
  const auto schedule = sm90::make_schedule(rows, D, classes, sms, most_partials);
  const sm90::ScheduleLoad load = sm90::load_of(schedule);
  std::vector<std::tuple<int, int, int, int, int>> blocks;
  for (int block = 0; block < schedule.blocks; ++block) {
    const sm90::Range tiles = schedule.weight_tiles(block), steps = schedule.feature_steps(block);
    blocks.emplace_back(tiles.begin, tiles.end, steps.begin, steps.end, schedule.turn(block));
  }
  py::dict out;
  out["weight"] = std::pair(schedule.weight.count(), schedule.weight.steps);
  out["features"] = std::pair(schedule.features.count(), schedule.features.steps);
  out["whole"] = schedule.whole;
  out["blocks"] = blocks;
  out["partials"] = load.partials;
  out["parts"] = load.parts;
  out["steps"] = load.steps;
  return out;
}

// Makes the calls of one step with bfloat16 features and a float32 weight, with addresses that
// nothing may access: to be used while launches are not executed.
void call_step(int64_t N, int64_t C, int64_t D, int capability) {
  Gpu gpu = *find_gpu("H200");
  gpu.capability = capability;
  CudaProblem problem = mixed_problem(N, C, D);
  offer_to_keep(problem, gpu);
  const CudaPlan plan = plan_cuda(problem, gpu);
  void* const nowhere = reinterpret_cast<void*>(uintptr_t(1) << 20);
  CudaHead head{};
  head.N = N, head.C = C, head.D = D;
  head.x = {nowhere, DType::kBFloat16, D, 1};
  head.weight = {nowhere, DType::kFloat32, D, 1};
  head.target = static_cast<int64_t*>(nowhere);
  head.target_stride = 1;
  head.scale = {nowhere, DType::kFloat32, 0, 0};
  const LossOptions options{0, Reduction::kMean};
  CudaStatistics statistics{};
  statistics.loss = nowhere;
  check(cuda_forward(plan, {.head = head,
                            .options = options,
                            .out = statistics,
                            .saved = nowhere,
                            .workspace = nowhere,
                            .stream = nullptr}));
  const CudaGradients gradients{.x = {nowhere, DType::kBFloat16},
                                .weight = {nowhere, DType::kFloat32},
                                .kappa = {},
                                .scale = {nowhere, DType::kFloat32},
                                .bias = {}};
  CudaUpstream upstream{};
  upstream.loss = {nowhere, DType::kFloat32, 0, 0};
  check(cuda_backward(plan, {.head = head,
                             .options = options,
                             .upstream = upstream,
                             .out = gradients,
                             .saved = nowhere,
                             .workspace = nowhere,
                             .stream = nullptr}));
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, module) {
  bind_runtime(module);
  bind_faults(module);
  module.def("step", step);
  module.def("hopper_seconds", hopper_seconds);
  module.def("product_schedule", product_schedule);
  module.def("call_step", call_step);
}
