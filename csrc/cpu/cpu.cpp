// The CPU path: matrix products by PyTorch's library, everything between them in cpu_tile.cpp,
// over blocks of classes whose N x block tile stays in cache.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif
#endif

#include "cpu/plan.h"
#include "cpu/tile.h"
#include "similarity.h"
#include "torch/ops.h"

namespace tvmf {

#define TVMF_DECLARE_ISA(isa)               \
  namespace isa {                           \
  extern const TileKernels<float> kFloat;   \
  extern const TileKernels<double> kDouble; \
  }
TVMF_DECLARE_ISA(baseline)
#ifdef TVMF_X86
TVMF_DECLARE_ISA(avx2)
TVMF_DECLARE_ISA(avx512)
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;

struct Kernels {
  const char* name;
  const TileKernels<float>* f32;
  const TileKernels<double>* f64;
};

Kernels choose_kernels() {
#ifdef TVMF_X86
  const char* forced = std::getenv("TVMF_CPU_CAPABILITY");
  const std::string limit = forced ? forced : "avx512";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (has_avx512 && limit == "avx512") return {"avx512", &avx512::kFloat, &avx512::kDouble};
  if (has_avx2 && limit != "baseline") return {"avx2", &avx2::kFloat, &avx2::kDouble};
#endif
  return {"baseline", &baseline::kFloat, &baseline::kDouble};
}

const Kernels& kernels() {
  static const Kernels chosen = choose_kernels();
  return chosen;
}

template <class T>
constexpr ScalarType kDtype = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// Large tensors come as untouched pages. Asking for them together, on all threads, takes less than
// half of the time that a matrix product loses by faulting on them one by one.
Tensor populated(const Tensor& tensor) {
#ifdef MADV_POPULATE_WRITE
  constexpr int64_t kPage = 4096, kChunk = int64_t(1) << 22;
  const auto begin = round_up(reinterpret_cast<int64_t>(tensor.data_ptr()), kPage);
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size()) - kPage;
  if (bytes >= 2 * kChunk)
    parallel_for(0, ceil_div(bytes, kChunk), 1, [&](int64_t first, int64_t last) {
      const int64_t from = first * kChunk, to = std::min(last * kChunk, bytes / kPage * kPage);
      // Advice: a kernel that does not know it leaves the pages to be faulted in.
      madvise(reinterpret_cast<void*>(begin + from), to - from, MADV_POPULATE_WRITE);
    });
#endif
  return tensor;
}

// Operators that torch/csrc/stable/ops.h of torch 2.11 does not wrap; all return one tensor.
template <class... Args>
Tensor call_dispatcher(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A strided view of memory: rows x cols, element (i, j) at data[i * row_stride + j * col_stride].
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, row_stride, col_stride = 1;

  T& operator()(int64_t i, int64_t j) const { return data[i * row_stride + j * col_stride]; }
  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
  Tensor tensor() const {
    const std::array<int64_t, 2> sizes{rows, cols}, strides{row_stride, col_stride};
    return torch::stable::from_blob(const_cast<std::remove_const_t<T>*>(data), sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    kDtype<std::remove_const_t<T>>);
  }
};

// out = a b, or out += a b
template <class T>
void matmul(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, bool add = false) {
  // Two thousand multiply-adds take less time than the way to the library.
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

// The rows of a tensor in the compute dtype with unit column stride: a view where it already is
// so, else converted block by block into one buffer.
template <class T>
class Rows {
 public:
  Rows(const Tensor& tensor, int64_t max_rows)
      : tensor_(tensor),
        direct_(tensor.scalar_type() == kDtype<T> &&
                (tensor.size(1) == 1 || tensor.stride(1) == 1) &&
                (tensor.size(0) == 1 || tensor.stride(0) >= tensor.size(1))) {
    if (!direct_) buffer_ = empty({max_rows, tensor.size(1)}, kDtype<T>);
  }

  bool direct() const { return direct_; }

  Matrix<T> block(int64_t begin, int64_t count) {
    const int64_t D = tensor_.size(1);
    if (direct_) {
      // A tensor of one row may carry any stride, and BLAS wants at least the row's length.
      const int64_t ld = std::max(tensor_.stride(0), D);
      return {data<T>(tensor_) + begin * ld, count, D, ld};
    }
    Tensor out = torch::stable::narrow(*buffer_, 0, 0, count);
    Tensor in = tensor_;
    torch::stable::copy_(out, torch::stable::narrow(in, 0, begin, count));
    return {data<T>(*buffer_), count, D, D};
  }

 private:
  Tensor tensor_;
  bool direct_;
  std::optional<Tensor> buffer_;
};

// One value per class or one for all, in the compute dtype.
template <class T>
class PerClass {
 public:
  PerClass(const std::optional<Tensor>& tensor, double value) : value_(T(value)) {
    if (!tensor) return;
    tensor_ = to_dtype(*tensor, kDtype<T>);
    values_ = data<T>(*tensor_);
    size_ = tensor_->numel();
    stride_ = size_ > 1 ? tensor_->stride(0) : 0;
  }
  PerClass(const PerClass&) = delete;

  T operator[](int64_t c) const { return values_[c * stride_]; }
  int64_t size() const { return size_; }

 private:
  T value_;
  std::optional<Tensor> tensor_;
  const T* values_ = &value_;
  int64_t stride_ = 0, size_ = 1;
};

template <class T>
struct Terms {
  explicit Terms(const Head& head)
      : kappa(head.kappa, head.kappa_value),
        bias(head.bias, 0),
        prior(head.prior, 0),
        omega(head.class_weight, 1) {
    for (int64_t c = 0; c < kappa.size(); ++c)
      if (kappa[c] <= T(-0.5))
        refuse("kappa must be > -1/2", kappa[c],
               kappa.size() > 1 ? " for class " + std::to_string(c) : "");
    scale = PerClass<T>(head.scale, head.scale_value)[0];
    if (head.softplus_scale) {
      dscale = T(1) / (T(1) + std::exp(-scale));
      scale = std::max(scale, T(0)) + std::log1p(std::exp(-std::abs(scale))) + T(1);
    }
    if (scale <= 0) refuse("scale must be > 0", scale, "");
  }
  PerClass<T> kappa, bias, prior, omega;
  T scale;
  T dscale = 1;  // its derivative by what is given

 private:
  [[noreturn]] static void refuse(const char* wanted, T got, const std::string& where) {
    std::ostringstream text;
    text << wanted << ", got " << got << where << " in "
         << (sizeof(T) == 4 ? "float32" : "float64");
    throw std::invalid_argument(text.str());
  }
};

// Class terms of one block, padded to whole vectors.
template <class T>
class BlockTerms {
 public:
  BlockTerms(const Terms<T>& terms, int64_t width, bool with_omega)
      : terms_(terms), width_(width), with_omega_(with_omega), values_(5 * width) {}

  ClassTerms<T> fill(int64_t begin, int64_t count, int64_t ld, const T* weight_rnorm) {
    T *rnorm = values_.data(), *kappa = rnorm + width_, *bias = kappa + width_,
      *offset = bias + width_, *omega = offset + width_;
    const T scale = terms_.scale;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = begin + i;
      rnorm[i] = weight_rnorm[c];
      kappa[i] = terms_.kappa[c];
      bias[i] = terms_.bias[c];
      offset[i] = scale * bias[i] + terms_.prior[c];
      omega[i] = terms_.omega[c];
    }
    for (int64_t i = count; i < ld; ++i) {
      rnorm[i] = kappa[i] = bias[i] = omega[i] = 0;
      offset[i] = -std::numeric_limits<T>::infinity();
    }
    return {rnorm, kappa, bias, offset, with_omega_ ? omega : nullptr};
  }

 private:
  const Terms<T>& terms_;
  int64_t width_;
  bool with_omega_;
  std::vector<T> values_;
};

struct Block {
  int64_t begin, count, ld;
  bool kept;
};

// The kept classes first, then the others, each in blocks.
std::vector<Block> blocks_of(int64_t C, int64_t kept, int64_t class_block) {
  std::vector<Block> blocks;
  const int64_t kept_classes = std::min(kept, C);
  for (int64_t begin = 0; begin < C;) {
    const bool keep = begin < kept_classes;
    const int64_t count = std::min(class_block, (keep ? kept_classes : C) - begin);
    blocks.push_back({begin, count, round_up(count, kPad), keep});
    begin += count;
  }
  return blocks;
}

// The column of each row's target in the block, or -1.
void block_labels(const std::vector<int64_t>& label, const Block& block, int64_t* out) {
  for (size_t n = 0; n < label.size(); ++n) {
    const int64_t column = label[n] - block.begin;
    out[n] = column >= 0 && column < block.count ? column : -1;
  }
}

// Rows of X times rows of a block: product[n, i] = <x_n, w_{begin + i}>, padding zero. The target's
// is the one that its score came from, in both passes: a probability near 1 leaves only its bits.
template <class T>
void block_product(const Matrix<T>& x, const Matrix<T>& weight, const Block& block,
                   const int64_t* column, const T* target_product, T* product) {
  matmul<T>({product, x.rows, block.count, block.ld}, x, weight.transposed());
  for (int64_t n = 0; n < x.rows; ++n) {
    T* row = product + n * block.ld;
    std::fill(row + block.count, row + block.ld, T(0));
    if (column[n] >= 0) row[column[n]] = target_product[n];
  }
}

// Row and column partition of a tile into tasks.
struct Tasks {
  int64_t N, ld;
  CpuPlan plan;
  int64_t groups = ceil_div(N, plan.row_group), stripes = ceil_div(ld, plan.stripe);

  template <class F>
  void run(const F& task) const {
    // Below some 8 thousand elements a thread costs more than it brings.
    const int64_t elements = std::min(N, plan.row_group) * std::min(ld, plan.stripe);
    parallel_for(0, groups * stripes, ceil_div(8192, elements), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / stripes, stripe = i % stripes;
        task(group, stripe,
             Range{group * plan.row_group, std::min(N, (group + 1) * plan.row_group)},
             Range{stripe * plan.stripe, std::min(ld, (stripe + 1) * plan.stripe)});
      }
    });
  }
};

// Work on whole rows of D features: at least 16 thousand elements a thread.
template <class F>
void parallel_rows(int64_t rows, int64_t D, const F& task) {
  parallel_for(0, rows, ceil_div(16384, D), task);
}

template <class T>
void rnorm(const Matrix<T>& rows, T* out) {
  parallel_rows(rows.rows, rows.cols, [&](int64_t begin, int64_t end) {
    tile_kernels<T>().rnorm(rows.data + begin * rows.row_stride, rows.row_stride, end - begin,
                            rows.cols, out + begin);
  });
}

// Targets as class indices, -1 where ignored.
std::vector<int64_t> read_labels(const Head& head) {
  const int64_t N = head.target.size(0), C = head.weight.size(0);
  const int64_t stride = N > 0 ? head.target.stride(0) : 1;
  const int64_t* target = data<int64_t>(head.target);
  std::vector<int64_t> label(N);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t y = target[n * stride];
    if (y == head.ignore_index) {
      label[n] = -1;
    } else if (y < 0 || y >= C) {
      throw std::out_of_range("target[" + std::to_string(n) + "] is " + std::to_string(y) +
                              ", wanted a class in [0, " + std::to_string(C) +
                              ") or ignore_index " + std::to_string(head.ignore_index));
    } else {
      label[n] = y;
    }
  }
  return label;
}

// One call: its sizes, plan, per-class terms and labels, in the compute dtype.
template <class T>
struct Problem {
  explicit Problem(const Head& head)
      : head(head),
        N(head.input.size(0)),
        C(head.weight.size(0)),
        D(head.input.size(1)),
        plan(plan_cpu(N, C, D, sizeof(T))),
        terms(head),
        label(read_labels(head)) {}

  const Head& head;
  int64_t N, C, D;
  CpuPlan plan;
  Terms<T> terms;
  std::vector<int64_t> label;
};

// Per row the product with its target's weight and the score phi + bias, known before the blocks
// are, so that ranks need one pass.
template <class T>
void target_scores(const Problem<T>& problem, const Matrix<T>& x, Rows<T>& weight, const T* x_rnorm,
                   T* product, T* score) {
  constexpr int64_t kGather = 256;
  const auto& k = tile_kernels<T>();
  const int64_t N = problem.N, C = problem.C, D = problem.D;
  const Head& head = problem.head;
  const Terms<T>& terms = problem.terms;
  const std::vector<int64_t>& label = problem.label;
  std::vector<int64_t> row(N);
  for (int64_t begin = 0; begin < N; begin += kGather) {
    const int64_t count = std::min(kGather, N - begin);
    Matrix<T> w;
    Tensor gathered;
    for (int64_t n = begin; n < begin + count; ++n) row[n] = std::max<int64_t>(label[n], 0);
    if (weight.direct()) {
      w = weight.block(0, C);
    } else {
      const std::array<int64_t, 1> sizes{count}, strides{1};
      const Tensor index = torch::stable::from_blob(
          row.data() + begin, sizes, strides,
          torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Long);
      gathered = to_dtype(call_dispatcher("aten::index_select", "", head.weight, int64_t(0), index),
                          kDtype<T>);
      w = {data<T>(gathered), count, D, D};
      for (int64_t i = 0; i < count; ++i) row[begin + i] = i;
    }
    parallel_rows(count, D, [&](int64_t first, int64_t last) {
      for (int64_t n = begin + first; n < begin + last; ++n) {
        const int64_t c = std::max<int64_t>(label[n], 0);
        const T kappa = terms.kappa[c], bias = terms.bias[c];
        T w_rnorm;
        k.rnorm(w.data + row[n] * w.row_stride, w.row_stride, 1, D, &w_rnorm);
        k.dot(x.data + n * x.row_stride, x.row_stride, w.data, w.row_stride, &row[n], 1, D,
              &product[n]);
        k.score(&product[n], &x_rnorm[n], &w_rnorm, &kappa, &bias, 1, &score[n]);
      }
    });
  }
}

template <class T>
void row_statistics(const Problem<T>& problem, bool with_sum, int64_t kept, T* saved, T* target,
                    T* sum, int64_t* rank) {
  const auto& k = tile_kernels<T>();
  const int64_t N = problem.N, C = problem.C;
  const Head& head = problem.head;
  const CpuPlan& plan = problem.plan;
  const Terms<T>& terms = problem.terms;
  const std::vector<int64_t>& label = problem.label;
  const SavedLayout layout(N, C, kept);
  T *saved_max = saved + layout.max, *saved_sum_exp = saved + layout.sum_exp;
  T *target_product = saved + layout.target_product, *x_rnorm = saved + layout.x_rnorm;
  T* weight_rnorm = saved + layout.weight_rnorm;
  if (N == 0) {
    std::fill(saved, saved + layout.size, T(0));
    return;
  }

  Rows<T> input(head.input, N), weight(head.weight, plan.class_block);
  const Matrix<T> x = input.block(0, N);
  rnorm(x, x_rnorm);

  const int64_t stripes = ceil_div(plan.class_block, plan.stripe);
  std::fill(weight_rnorm + C, saved + layout.product, T(0));
  std::vector<T> target_score(N);
  std::vector<T> running_max(N, -std::numeric_limits<T>::infinity()), running_sum_exp(N);
  std::vector<T> part_max(stripes * N), part_sum_exp(stripes * N), part_sum(stripes * N);
  std::vector<int64_t> part_rank(stripes * N), column(N);
  target_scores(problem, x, weight, x_rnorm, target_product, target_score.data());
  std::fill(target, target + N, T(0));
  std::fill(sum, sum + (with_sum ? N : 0), T(0));
  std::fill(rank, rank + N, 0);

  BlockTerms<T> block_terms(terms, plan.class_block, with_sum);
  std::optional<Tensor> scratch;
  for (const Block& block : blocks_of(C, kept, plan.class_block)) {
    // Multiply: the block's products, kept for the backward pass or in the one scratch tile.
    const Matrix<T> w = weight.block(block.begin, block.count);
    rnorm(w, weight_rnorm + block.begin);
    if (!block.kept && !scratch) scratch = empty({N * plan.class_block}, kDtype<T>);
    T* product = block.kept ? saved + layout.product + N * block.begin : data<T>(*scratch);
    block_labels(label, block, column.data());
    block_product(x, w, block, column.data(), target_product, product);

    // Reduce: partial statistics of each stripe of columns.
    const ClassTerms<T> class_terms =
        block_terms.fill(block.begin, block.count, block.ld, weight_rnorm);
    const Tasks tasks{N, block.ld, plan};
    tasks.run([&](int64_t, int64_t stripe, Range rows, Range cols) {
      k.forward({product, block.ld, block.count, x_rnorm, column.data(), target_score.data(),
                 class_terms, terms.scale, &part_max[stripe * N], &part_sum_exp[stripe * N],
                 &part_sum[stripe * N], &part_rank[stripe * N], target},
                rows, cols);
    });

    // Merge the stripes into the running statistics, always in the order of classes.
    for (int64_t stripe = 0; stripe < tasks.stripes; ++stripe) {
      for (int64_t n = 0; n < N; ++n) {
        const T part = part_max[stripe * N + n], old = running_max[n], max = std::max(old, part);
        const T keep_old = old == max ? T(1) : std::exp(old - max);
        const T keep_part = part == max ? T(1) : std::exp(part - max);
        running_max[n] = max;
        running_sum_exp[n] =
            running_sum_exp[n] * keep_old + part_sum_exp[stripe * N + n] * keep_part;
        rank[n] += part_rank[stripe * N + n];
        if (with_sum) sum[n] += part_sum[stripe * N + n];
      }
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    saved_max[n] = running_max[n];
    saved_sum_exp[n] = running_sum_exp[n];
    rank[n] = label[n] < 0 ? -1 : std::min(rank[n], C - 1);
  }
}

template <class T>
std::vector<T> read_vector(const std::optional<Tensor>& tensor, int64_t N) {
  std::vector<T> values(N);
  if (!tensor || N == 0) return values;
  const Tensor converted = to_dtype(*tensor, kDtype<T>);
  const int64_t stride = converted.dim() == 0 ? 0 : converted.stride(0);
  for (int64_t n = 0; n < N; ++n) values[n] = data<T>(converted)[n * stride];
  return values;
}

// A gradient to be filled: the sizes of its tensor, or [0] where it is not wanted.
Tensor empty_gradient(const Head& head, const std::optional<Tensor>& of, bool wanted,
                      ScalarType dtype) {
  if (!wanted) return empty({0}, head.input.scalar_type());
  return empty(of->sizes(), dtype);
}

// Each wanted gradient in its tensor's dtype; the weight's is made in it.
Gradients in_own_dtypes(const Head& head, Gradients out, int64_t wanted) {
  if (wanted & kInput) out.input = to_dtype(out.input, head.input.scalar_type());
  if (wanted & kKappa) out.kappa = to_dtype(out.kappa, head.kappa->scalar_type());
  if (wanted & kScale) out.scale = to_dtype(out.scale, head.scale->scalar_type());
  if (wanted & kBias) out.bias = to_dtype(out.bias, head.bias->scalar_type());
  return out;
}

template <class T>
Gradients row_statistics_backward(const Problem<T>& problem, const T* saved, int64_t kept,
                                  const std::vector<T>& grad_lse, const std::vector<T>& grad_target,
                                  const std::vector<T>& grad_sum, bool with_sum, int64_t wanted) {
  const auto& k = tile_kernels<T>();
  const int64_t N = problem.N, C = problem.C, D = problem.D;
  const Head& head = problem.head;
  const CpuPlan& plan = problem.plan;
  const Terms<T>& terms = problem.terms;
  const std::vector<int64_t>& label = problem.label;
  const SavedLayout layout(N, C, kept);
  const T *target_product = saved + layout.target_product, *x_rnorm = saved + layout.x_rnorm;
  const T* weight_rnorm = saved + layout.weight_rnorm;
  const bool class_sums = (wanted & kBias) || (wanted & kKappa);
  const ScalarType weight_dtype = head.weight.scalar_type();
  const bool weight_direct = weight_dtype == kDtype<T>;
  const T scale = terms.scale;

  Gradients out{empty_gradient(head, head.input, wanted & kInput, kDtype<T>),
                populated(empty_gradient(head, head.weight, wanted & kWeight, weight_dtype)),
                empty_gradient(head, head.kappa, wanted & kKappa, kDtype<T>),
                empty_gradient(head, head.scale, wanted & kScale, kDtype<T>),
                empty_gradient(head, head.bias, wanted & kBias, kDtype<T>)};
  if (N == 0) {
    for (Tensor* gradient : {&out.weight, &out.kappa, &out.scale, &out.bias})
      torch::stable::zero_(*gradient);
    return in_own_dtypes(head, out, wanted);
  }
  T *grad_input = data<T>(out.input), *grad_kappa = data<T>(out.kappa);
  T* grad_bias = data<T>(out.bias);
  double total_kappa = 0, total_scale = 0;

  Rows<T> input(head.input, N), weight(head.weight, plan.class_block);
  const Matrix<T> x = input.block(0, N);
  const int64_t groups = ceil_div(N, plan.row_group);
  const int64_t stripes = ceil_div(plan.class_block, plan.stripe);

  std::vector<int64_t> column(N);
  std::vector<T> row_dot(N), part_row_dot(stripes * N), part_row_scale(stripes * N);
  std::vector<T> col_dot(groups * plan.class_block), factor(plan.class_block);
  std::vector<T> col_bias(class_sums ? groups * plan.class_block : 0), col_kappa(col_bias.size());
  BlockTerms<T> block_terms(terms, plan.class_block, with_sum);
  const Tensor grad_tile = empty({N * plan.class_block}, kDtype<T>);
  T* grad = data<T>(grad_tile);
  std::optional<Tensor> weight_part;

  for (const Block& block : blocks_of(C, kept, plan.class_block)) {
    // Multiply again where the forward pass did not keep the products.
    const Matrix<T> w = weight.block(block.begin, block.count);
    const T* product = block.kept ? saved + layout.product + N * block.begin : grad;
    block_labels(label, block, column.data());
    if (!block.kept) block_product(x, w, block, column.data(), target_product, grad);

    // Differentiate: the tile t_nc r_n q_c, and its sums along rows and columns.
    std::fill(col_dot.begin(), col_dot.end(), T(0));
    std::fill(col_bias.begin(), col_bias.end(), T(0));
    std::fill(col_kappa.begin(), col_kappa.end(), T(0));
    const ClassTerms<T> class_terms =
        block_terms.fill(block.begin, block.count, block.ld, weight_rnorm);
    const Tasks tasks{N, block.ld, plan};
    tasks.run([&](int64_t group, int64_t stripe, Range rows, Range cols) {
      const int64_t col = group * plan.class_block;
      k.backward({product, grad, block.ld, x_rnorm, column.data(), saved + layout.max,
                  saved + layout.sum_exp, grad_lse.data(), grad_target.data(), grad_sum.data(),
                  class_terms, scale, &part_row_dot[stripe * N], &part_row_scale[stripe * N],
                  &col_dot[col], class_sums ? &col_bias[col] : nullptr,
                  class_sums ? &col_kappa[col] : nullptr},
                 rows, cols);
    });
    for (int64_t stripe = 0; stripe < tasks.stripes; ++stripe) {
      for (int64_t n = 0; n < N; ++n) {
        row_dot[n] += part_row_dot[stripe * N + n];
        total_scale += part_row_scale[stripe * N + n];
      }
    }
    for (int64_t group = 1; group < groups; ++group) {
      const int64_t col = group * plan.class_block;
      k.add(&col_dot[col], block.count, col_dot.data());
      if (class_sums) {
        k.add(&col_bias[col], block.count, col_bias.data());
        k.add(&col_kappa[col], block.count, col_kappa.data());
      }
    }
    for (int64_t i = 0; class_sums && i < block.count; ++i) {
      total_kappa += double(scale) * col_kappa[i];
      if (wanted & kBias) grad_bias[block.begin + i] = scale * col_bias[i];
      if ((wanted & kKappa) && terms.kappa.size() > 1)
        grad_kappa[block.begin + i] = scale * col_kappa[i];
    }

    // Multiply: the block's weight gradient, onto its projection, and its share of the input's.
    const Matrix<T> tile{grad, N, block.count, block.ld};
    if (wanted & kWeight) {
      if (!weight_direct && !weight_part) weight_part = empty({plan.class_block, D}, kDtype<T>);
      T* to = weight_direct ? data<T>(out.weight) + block.begin * D : data<T>(*weight_part);
      for (int64_t i = 0; i < block.count; ++i) {
        const T q = weight_rnorm[block.begin + i];
        factor[i] = q < T(1 / kEps) ? -col_dot[i] * q * q : T(0);
      }
      parallel_rows(block.count, D, [&](int64_t begin, int64_t end) {
        k.multiply(w.data + begin * w.row_stride, w.row_stride, &factor[begin], end - begin, D,
                   to + begin * D);
      });
      matmul<T>({to, block.count, D, D}, tile.transposed(), x, true);
      if (!weight_direct) {
        Tensor rows = torch::stable::narrow(out.weight, 0, block.begin, block.count);
        torch::stable::copy_(rows, torch::stable::narrow(*weight_part, 0, 0, block.count));
      }
    }
    if (wanted & kInput) matmul<T>({grad_input, N, D, D}, tile, w, block.begin > 0);
  }

  if (wanted & kInput) {
    for (int64_t n = 0; n < N; ++n)
      row_dot[n] = x_rnorm[n] < T(1 / kEps) ? -row_dot[n] * x_rnorm[n] * x_rnorm[n] : T(0);
    parallel_rows(N, D, [&](int64_t begin, int64_t end) {
      k.multiply_add(x.data + begin * x.row_stride, x.row_stride, &row_dot[begin], end - begin, D,
                     grad_input + begin * D);
    });
  }
  if ((wanted & kKappa) && terms.kappa.size() == 1) grad_kappa[0] = T(total_kappa);
  if (wanted & kScale) data<T>(out.scale)[0] = T(total_scale * terms.dscale);
  return in_own_dtypes(head, out, wanted);
}

// The loss per row is (1 - e) omega_y (lse - target) + e / C (lse sum_c omega_c - sum).
template <class T>
struct LossTerms {
  LossTerms(const Problem<T>& problem, const LossOptions& options)
      : keep(1 - options.label_smoothing), smooth(options.label_smoothing / problem.C) {
    for (int64_t y : problem.label) total_weight += y < 0 ? 0 : problem.terms.omega[y];
    for (int64_t c = 0; smooth > 0 && c < problem.C; ++c) smooth_total += problem.terms.omega[c];
    smooth_total *= smooth;
  }
  double keep, smooth, smooth_total = 0, total_weight = 0;
};

template <class T>
Loss cross_entropy(const Head& head, const LossOptions& options, int64_t kept) {
  const Problem<T> problem(head);
  const int64_t N = problem.N;
  const bool reduced = options.reduction != Reduction::kNone,
             with_sum = options.label_smoothing > 0;
  Tensor loss = reduced ? empty({}, kDtype<T>) : empty({N}, kDtype<T>);
  const Tensor saved = populated(empty({SavedLayout(N, problem.C, kept).size}, kDtype<T>));
  std::vector<T> target(N), sum(with_sum ? N : 0);
  std::vector<int64_t> rank(N);
  row_statistics(problem, with_sum, kept, data<T>(saved), target.data(), sum.data(), rank.data());

  const LossTerms<T> terms(problem, options);
  const SavedLayout layout(N, problem.C, kept);
  const T *max = data<T>(saved) + layout.max, *sum_exp = data<T>(saved) + layout.sum_exp;
  double total = 0;
  for (int64_t n = 0; n < N; ++n) {
    double row = 0;
    const double log_sum = std::log(double(sum_exp[n]));
    if (const int64_t y = problem.label[n]; y >= 0) {
      row = terms.keep * problem.terms.omega[y] * (max[n] - target[n] + log_sum);
      if (with_sum) row += terms.smooth_total * (max[n] + log_sum) - terms.smooth * sum[n];
    }
    total += row;
    if (!reduced) data<T>(loss)[n] = T(row);
  }
  if (options.reduction == Reduction::kMean) total /= terms.total_weight;
  if (reduced) data<T>(loss)[0] = T(total);
  return {loss, saved};
}

template <class T>
Gradients cross_entropy_backward(const Head& head, const LossOptions& options, const Tensor& saved,
                                 int64_t kept, const Tensor& grad_loss, int64_t wanted) {
  const Problem<T> problem(head);
  const LossTerms<T> terms(problem, options);
  const int64_t N = problem.N;
  const bool reduced = options.reduction != Reduction::kNone;
  const std::vector<T> upstream = read_vector<T>(grad_loss, reduced ? 1 : N);

  // dL/dloss_n, then the gradients of the row's lse, target and sum.
  std::vector<T> a(N), b(N), s(N);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t y = problem.label[n];
    if (y < 0) continue;
    double g = upstream[reduced ? 0 : n];
    if (options.reduction == Reduction::kMean) g /= terms.total_weight;
    const double weighted = terms.keep * problem.terms.omega[y];
    a[n] = T(g * (weighted + terms.smooth_total));
    b[n] = T(-g * weighted);
    s[n] = T(-g * terms.smooth);
  }
  return row_statistics_backward<T>(problem, data<T>(saved), kept, a, b, s,
                                    options.label_smoothing > 0, wanted);
}

template <class F>
auto with_compute_dtype(const Head& head, const F& f) {
  return head.input.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace

const char* cpu_capability() { return kernels().name; }
template <>
const TileKernels<float>& tile_kernels<float>() {
  return *kernels().f32;
}
template <>
const TileKernels<double>& tile_kernels<double>() {
  return *kernels().f64;
}

RowStatistics cpu_row_statistics(const Head& head, bool with_sum, int64_t kept) {
  return with_compute_dtype(head, [&](auto t) {
    using T = decltype(t);
    const Problem<T> problem(head);
    const int64_t N = problem.N;
    const Tensor saved = populated(empty({SavedLayout(N, problem.C, kept).size}, kDtype<T>));
    RowStatistics out{empty({N}, kDtype<T>), empty({N}, kDtype<T>),
                      empty({with_sum ? N : 0}, kDtype<T>), empty({N}, ScalarType::Long), saved};
    row_statistics(problem, with_sum, kept, data<T>(saved), data<T>(out.target), data<T>(out.sum),
                   data<int64_t>(out.rank));
    const SavedLayout layout(N, problem.C, kept);
    const T *max = data<T>(saved) + layout.max, *sum_exp = data<T>(saved) + layout.sum_exp;
    for (int64_t n = 0; n < N; ++n) data<T>(out.lse)[n] = max[n] + std::log(sum_exp[n]);
    return out;
  });
}

Gradients cpu_row_statistics_backward(const Head& head, const Tensor& saved, int64_t kept,
                                      const std::optional<Tensor>& grad_lse,
                                      const std::optional<Tensor>& grad_target,
                                      const std::optional<Tensor>& grad_sum, int64_t wanted) {
  return with_compute_dtype(head, [&](auto t) {
    using T = decltype(t);
    const Problem<T> problem(head);
    const int64_t N = problem.N;
    return row_statistics_backward<T>(problem, data<T>(saved), kept, read_vector<T>(grad_lse, N),
                                      read_vector<T>(grad_target, N), read_vector<T>(grad_sum, N),
                                      grad_sum.has_value(), wanted);
  });
}

Loss cpu_cross_entropy(const Head& head, const LossOptions& options, int64_t kept) {
  return with_compute_dtype(
      head, [&](auto t) { return cross_entropy<decltype(t)>(head, options, kept); });
}

Gradients cpu_cross_entropy_backward(const Head& head, const LossOptions& options,
                                     const Tensor& saved, int64_t kept, const Tensor& grad_loss,
                                     int64_t wanted) {
  return with_compute_dtype(head, [&](auto t) {
    return cross_entropy_backward<decltype(t)>(head, options, saved, kept, grad_loss, wanted);
  });
}

}  // namespace tvmf
