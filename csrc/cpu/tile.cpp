// CPU tile kernels in portable vector code: cosine -> phi -> logit -> row statistics, and back.
// CMake compiles this file once per instruction set with TVMF_ISA naming it; every set gives the
// same bits, because sums run in 64 bytes of lanes everywhere and no multiply-add is contracted.
#include "cpu/tile.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "cpu/plan.h"
#include "similarity.h"

namespace tvmf::TVMF_ISA {
namespace {

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Bits = int32_t;
  static constexpr int kMantissa = 23, kExponentBias = 127, kExpTerms = 7;
  static constexpr float kExpMin = -87.f;
  static constexpr float kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;
};

template <>
struct Lanes<double> {
  using Bits = int64_t;
  static constexpr int kMantissa = 52, kExponentBias = 1023, kExpTerms = 13;
  static constexpr double kExpMin = -708.;
  static constexpr double kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
};

// The widest vectors that the instruction set computes with: of wider ones GCC takes comparisons,
// selections and conversions apart into scalars.
#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

// kLanes sums go side by side in every instruction set, so that all add in the same order. A loop
// over columns runs once for each vector of them: one vector's values fit the registers.
template <class T>
struct Simd {
  static constexpr int64_t kLanes = 64 / sizeof(T), kWidth = kVectorBytes / sizeof(T);
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  typedef typename Lanes<T>::Bits Int __attribute__((vector_size(kVectorBytes)));

  static inline Vec load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static inline void store(T* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }

  static inline Vec iota() {
    Vec v;
    for (int64_t i = 0; i < kWidth; ++i) v[i] = T(i);
    return v;
  }

  // 1 / k!
  static constexpr auto kTaylor = [] {
    std::array<T, Lanes<T>::kExpTerms + 1> terms{T(1)};
    for (size_t k = 1; k < terms.size(); ++k) terms[k] = terms[k - 1] / k;
    return terms;
  }();

  // sum of r^k / (k + kFirst)!, k < kCount; powers are r, r^2, r^4, r^8.
  template <int kFirst, int kCount>
  static inline Vec polynomial(const Vec (&powers)[4]) {
    if constexpr (kCount == 1) {
      return Vec{} + kTaylor[kFirst];
    } else {
      constexpr int kLog = std::bit_width(unsigned(kCount - 1)) - 1, kHalf = 1 << kLog;
      return polynomial<kFirst, kHalf>(powers) +
             powers[kLog] * polynomial<kFirst + kHalf, kCount - kHalf>(powers);
    }
  }

  // exp(x) for x <= 88: x = n ln 2 + r, then Taylor's series of exp(r) on |r| <= ln(2)/2.
  static inline Vec exp(Vec x) {
    using L = Lanes<T>;
    // Adding it rounds to an integer, which it leaves in the low bits.
    constexpr T kRound = T(3) * (int64_t(1) << (L::kMantissa - 1));
    const Vec rounded = x * T(1.4426950408889634) + kRound;
    const Vec n = rounded - kRound;
    const Vec r = (x - n * L::kLn2High) - n * L::kLn2Low;
    // 1 + (r + r^2 (1/2! + r/3! + ...)), the bracket by halves: Horner's chain is twice as long,
    // and the time of a tile is that of its chains.
    const Vec square = r * r, fourth = square * square;
    const Vec powers[] = {r, square, fourth, fourth * fourth};
    const Vec series = (r + square * polynomial<2, L::kExpTerms - 1>(powers)) + T(1);
    const Int exponent = (std::bit_cast<Int>(rounded) + L::kExponentBias) << L::kMantissa;
    return x < L::kExpMin ? Vec{} : series * std::bit_cast<Vec>(exponent);
  }
};

// What a loop has gathered in its lanes.
template <class T>
struct Gathered {
  void put(int64_t lane, typename Simd<T>::Vec v) { Simd<T>::store(lanes + lane, v); }

  T sum() const {
    T total = 0;
    for (T lane : lanes) total += lane;
    return total;
  }

  T max() const {
    T largest = lanes[0];
    for (T lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
  }

  alignas(64) T lanes[Simd<T>::kLanes];
};

template <class T>
inline T inner_product(const T* a, const T* b, int64_t D) {
  using S = Simd<T>;
  constexpr int64_t kVectors = S::kLanes / S::kWidth, kStep = 2 * S::kLanes;
  typename S::Vec even[kVectors]{}, odd[kVectors]{};
  const auto add_step = [&](const T* a, const T* b) {
    for (int64_t i = 0; i < kVectors; ++i) {
      const T *a_odd = a + S::kLanes, *b_odd = b + S::kLanes;
      even[i] += S::load(a + i * S::kWidth) * S::load(b + i * S::kWidth);
      odd[i] += S::load(a_odd + i * S::kWidth) * S::load(b_odd + i * S::kWidth);
    }
  };
  int64_t d = 0;
  for (; d + kStep <= D; d += kStep) add_step(a + d, b + d);
  if (d < D) {
    T rest_a[kStep]{}, rest_b[kStep]{};
    std::copy(a + d, a + D, rest_a);
    std::copy(b + d, b + D, rest_b);
    add_step(rest_a, rest_b);
  }
  Gathered<T> lanes;
  for (int64_t i = 0; i < kVectors; ++i) lanes.put(i * S::kWidth, even[i] + odd[i]);
  return lanes.sum();
}

template <class T>
void rnorm(const T* rows, int64_t ld, int64_t count, int64_t D, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    const T norm = std::sqrt(inner_product(rows + i * ld, rows + i * ld, D));
    out[i] = T(1) / (norm < T(kEps) ? T(kEps) : norm);
  }
}

template <class T>
void dot(const T* x, int64_t ld_x, const T* w, int64_t ld_w, const int64_t* row, int64_t count,
         int64_t D, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = inner_product(x + i * ld_x, w + row[i] * ld_w, D);
}

template <class T>
void score(const T* product, const T* x_rnorm, const T* w_rnorm, const T* kappa, const T* bias,
           int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    const T cosine = clamp_cosine(product[i] * (w_rnorm[i] * x_rnorm[i]));
    out[i] = similarity(cosine, kappa[i]) + bias[i];
  }
}

template <class T, bool kOmega>
void forward_row(const ForwardTile<T>& tile, int64_t n, Range cols) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  const T* product = tile.product + n * tile.ld;
  const ClassTerms<T> terms = tile.terms;
  const T x_rnorm = tile.x_rnorm[n], target_score = tile.target_score[n], scale = tile.scale;
  const T count = T(tile.count);
  alignas(64) T logits[kStripe];  // in L1, between the maximum and the exponentials
  Gathered<T> largest_in, sum_in, sum_exp_in;

  // First pass: logits, their maximum, and how many classes score at or below the target.
  int64_t rank = cols.end - cols.begin;
  for (int64_t lane = 0; lane < S::kLanes; lane += S::kWidth) {
    Vec largest = Vec{} - std::numeric_limits<T>::infinity(), sum{};
    Vec index = S::iota() + T(cols.begin + lane);
    typename S::Int at_or_below{};
    for (int64_t c = cols.begin + lane; c < cols.end; c += S::kLanes) {
      const Vec rnorm = S::load(terms.weight_rnorm + c) * x_rnorm;
      const Vec cosine = clamp_cosine(S::load(product + c) * rnorm);
      const Vec phi = similarity(cosine, S::load(terms.kappa + c));
      const Vec logit = phi * scale + S::load(terms.offset + c);
      S::store(logits + (c - cols.begin), logit);
      largest = logit > largest ? logit : largest;
      const typename S::Int padding = index >= count;
      index += T(S::kLanes);
      at_or_below += ((phi + S::load(terms.bias + c)) <= target_score) | padding;
      if constexpr (kOmega) sum += padding ? Vec{} : S::load(terms.omega + c) * logit;
    }
    largest_in.put(lane, largest);
    sum_in.put(lane, sum);
    for (int64_t i = 0; i < S::kWidth; ++i) rank += at_or_below[i];
  }

  // Second pass: exponentials against the maximum; all logits -inf leaves a sum of zero.
  const T max = largest_in.max();
  const T shift = max == -std::numeric_limits<T>::infinity() ? T(0) : max;
  for (int64_t lane = 0; lane < S::kLanes; lane += S::kWidth) {
    Vec sum_exp{};
    for (int64_t c = lane; c < cols.end - cols.begin; c += S::kLanes)
      sum_exp += S::exp(S::load(logits + c) - shift);
    sum_exp_in.put(lane, sum_exp);
  }

  tile.max[n] = max;
  tile.sum_exp[n] = sum_exp_in.sum();
  tile.rank[n] = rank;
  if constexpr (kOmega) tile.sum[n] = sum_in.sum();
  const int64_t label = tile.label[n];
  if (label >= cols.begin && label < cols.end) tile.target[n] = logits[label - cols.begin];
}

template <class T>
void forward(const ForwardTile<T>& tile, Range rows, Range cols) {
  for (int64_t n = rows.begin; n < rows.end; ++n)
    tile.terms.omega ? forward_row<T, true>(tile, n, cols) : forward_row<T, false>(tile, n, cols);
}

template <class T, bool kOmega, bool kClassSums>
void backward_row(const BackwardTile<T>& tile, int64_t n, Range cols) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  const T* product = tile.product + n * tile.ld;
  T* grad = tile.grad + n * tile.ld;
  const ClassTerms<T> terms = tile.terms;
  const T x_rnorm = tile.x_rnorm[n], max = tile.max[n], scale = tile.scale;
  const T a = tile.grad_lse[n], b = tile.grad_target[n], s = kOmega ? tile.grad_sum[n] : T(0);
  const T a_over_sum = a / tile.sum_exp[n], label = T(tile.label[n]);
  T *col_dot = tile.col_dot, *col_bias = tile.col_bias, *col_kappa = tile.col_kappa;
  if (a == 0 && b == 0 && s == 0) {  // an ignored row
    std::fill(grad + cols.begin, grad + cols.end, T(0));
    tile.row_dot[n] = tile.row_scale[n] = 0;
    return;
  }

  Gathered<T> row_dot_in, row_scale_in;
  for (int64_t lane = 0; lane < S::kLanes; lane += S::kWidth) {
    Vec row_dot{}, row_scale{}, index = S::iota() + T(cols.begin + lane);
    for (int64_t c = cols.begin + lane; c < cols.end; c += S::kLanes) {
      // Recompute the logit from the product, to the bit as the forward pass had it.
      const Vec rnorm = S::load(terms.weight_rnorm + c) * x_rnorm;
      const Vec cosine = clamp_cosine(S::load(product + c) * rnorm);
      const auto sim = similarity_with_gradient(cosine, S::load(terms.kappa + c));
      const Vec logit = sim.phi * scale + S::load(terms.offset + c);

      // g = dL/dlogit, t = dL/dcosine
      Vec g = S::exp(logit - max) * a_over_sum;
      g = index == label ? g + b : g;
      index += T(S::kLanes);
      if constexpr (kOmega) g += S::load(terms.omega + c) * s;
      const Vec t = g * (scale * sim.dphi_dcosine);

      S::store(grad + c, t * rnorm);
      row_dot += t * cosine;
      row_scale += g * (sim.phi + S::load(terms.bias + c));
      S::store(col_dot + c, S::load(col_dot + c) + t * cosine);
      if constexpr (kClassSums) {
        S::store(col_bias + c, S::load(col_bias + c) + g);
        S::store(col_kappa + c, S::load(col_kappa + c) + g * sim.dphi_dkappa);
      }
    }
    row_dot_in.put(lane, row_dot);
    row_scale_in.put(lane, row_scale);
  }
  tile.row_dot[n] = row_dot_in.sum();
  tile.row_scale[n] = row_scale_in.sum();
}

template <class T, bool kOmega, bool kClassSums>
void backward_rows(const BackwardTile<T>& tile, Range rows, Range cols) {
  for (int64_t n = rows.begin; n < rows.end; ++n)
    backward_row<T, kOmega, kClassSums>(tile, n, cols);
}

template <class T>
void backward(const BackwardTile<T>& tile, Range rows, Range cols) {
  if (tile.terms.omega)
    tile.col_bias ? backward_rows<T, true, true>(tile, rows, cols)
                  : backward_rows<T, true, false>(tile, rows, cols);
  else
    tile.col_bias ? backward_rows<T, false, true>(tile, rows, cols)
                  : backward_rows<T, false, false>(tile, rows, cols);
}

template <class T, bool kAdd>
void multiply(const T* rows, int64_t ld, const T* factor, int64_t count, int64_t D, T* out) {
  using S = Simd<T>;
  for (int64_t i = 0; i < count; ++i) {
    const T* in = rows + i * ld;
    T* to = out + i * D;
    int64_t d = 0;
    for (; d + S::kWidth <= D; d += S::kWidth) {
      const auto v = S::load(in + d) * factor[i];
      S::store(to + d, kAdd ? S::load(to + d) + v : v);
    }
    for (; d < D; ++d) to[d] = kAdd ? to[d] + in[d] * factor[i] : in[d] * factor[i];
  }
}

template <class T>
void add(const T* in, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] += in[i];
}

template <class T>
constexpr TileKernels<T> kTable{rnorm<T>,          dot<T>,      score<T>,
                                forward<T>,        backward<T>, multiply<T, false>,
                                multiply<T, true>, add<T>};

}  // namespace

extern const TileKernels<float> kFloat;
extern const TileKernels<double> kDouble;
const TileKernels<float> kFloat = kTable<float>;
const TileKernels<double> kDouble = kTable<double>;

}  // namespace tvmf::TVMF_ISA
