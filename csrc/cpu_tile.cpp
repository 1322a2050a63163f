// CPU tile kernels in portable vector code: cosine -> phi -> logit -> row statistics, and back.
// CMake compiles this file once per instruction set with TVMF_ISA naming it; every set gives the
// same bits, because lanes are 64 bytes wide everywhere and no multiply-add is contracted.
#include <bit>
#include <cmath>
#include <limits>

#include "params.h"
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

template <class T>
struct Simd {
  static constexpr int64_t kLanes = 64 / sizeof(T);
  typedef T Vec __attribute__((vector_size(64)));
  typedef T Unaligned __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
  typedef typename Lanes<T>::Bits Int __attribute__((vector_size(64)));

  static inline Vec load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static inline void store(T* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }

  static inline Vec load_part(const T* p, int64_t count) {
    Vec v{};
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
  }

  static inline T reduce_add(Vec v) {
    T total = 0;
    for (int64_t i = 0; i < kLanes; ++i) total += v[i];
    return total;
  }

  static inline T reduce_max(Vec v) {
    T largest = v[0];
    for (int64_t i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
    return largest;
  }

  static inline Int iota() {
    Int v;
    for (int64_t i = 0; i < kLanes; ++i) v[i] = i;
    return v;
  }

  // 1 / k!
  static constexpr T taylor(int k) { return k == 0 ? T(1) : taylor(k - 1) / k; }

  // exp(x) for x <= 88: x = n ln 2 + r, then Taylor's series of exp(r) on |r| <= ln(2)/2.
  static inline Vec exp(Vec x) {
    using L = Lanes<T>;
    // Adding it rounds to an integer.
    constexpr T kRound = T(3) * (int64_t(1) << (L::kMantissa - 1));
    const Vec n = (x * T(1.4426950408889634) + kRound) - kRound;
    const Vec r = (x - n * L::kLn2High) - n * L::kLn2Low;
    Vec series = Vec{} + taylor(L::kExpTerms);
    for (int k = L::kExpTerms - 1; k >= 0; --k) series = series * r + taylor(k);
    const Int exponent = (__builtin_convertvector(n, Int) + L::kExponentBias) << L::kMantissa;
    return x < L::kExpMin ? Vec{} : series * std::bit_cast<Vec>(exponent);
  }
};

template <class T>
void rnorm(const T* rows, int64_t ld, int64_t count, int64_t D, T* out) {
  using S = Simd<T>;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows + i * ld;
    typename S::Vec even{}, odd{};
    int64_t d = 0;
    for (; d + 2 * S::kLanes <= D; d += 2 * S::kLanes) {
      const auto v0 = S::load(row + d), v1 = S::load(row + d + S::kLanes);
      even += v0 * v0;
      odd += v1 * v1;
    }
    for (; d < D; d += S::kLanes) {
      const auto v = d + S::kLanes <= D ? S::load(row + d) : S::load_part(row + d, D - d);
      even += v * v;
    }
    const T norm = std::sqrt(S::reduce_add(even + odd));
    out[i] = T(1) / (norm < T(kEps) ? T(kEps) : norm);
  }
}

template <class T>
void dot(const T* x, int64_t ld_x, const T* w, int64_t ld_w, const int64_t* row, int64_t count,
         int64_t D, T* out) {
  using S = Simd<T>;
  for (int64_t i = 0; i < count; ++i) {
    const T* a = x + i * ld_x;
    const T* b = w + row[i] * ld_w;
    typename S::Vec total{};
    int64_t d = 0;
    for (; d + S::kLanes <= D; d += S::kLanes) total += S::load(a + d) * S::load(b + d);
    if (d < D) total += S::load_part(a + d, D - d) * S::load_part(b + d, D - d);
    out[i] = S::reduce_add(total);
  }
}

template <class T>
void score(const T* product, const T* x_rnorm, const T* w_rnorm, const T* kappa, const T* bias,
           int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    const T cosine = clamp_cosine(product[i] * (w_rnorm[i] * x_rnorm[i]));
    out[i] = similarity(cosine, kappa[i]) + bias[i];
  }
}

// Columns that one pass keeps in L1: logits between the maximum and the exponentials.
constexpr int64_t kStripe = 512;

template <class T, bool kOmega>
void forward_row(const ForwardTile<T>& tile, int64_t n, Range cols) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  const T* product = tile.product + n * tile.ld;
  const T x_rnorm = tile.x_rnorm[n], target_score = tile.target_score[n];
  alignas(64) T logits[kStripe];

  // First pass: logits, their maximum, and how many classes score at or below the target.
  Vec largest = Vec{} - std::numeric_limits<T>::infinity();
  Vec sum{};
  typename S::Int at_or_below{}, index = S::iota() + typename Lanes<T>::Bits(cols.begin);
  for (int64_t c = cols.begin; c < cols.end; c += S::kLanes) {
    const Vec rnorm = S::load(tile.terms.weight_rnorm + c) * x_rnorm;
    const Vec cosine = clamp_cosine(S::load(product + c) * rnorm);
    const Vec phi = similarity(cosine, S::load(tile.terms.kappa + c));
    const Vec logit = phi * tile.scale + S::load(tile.terms.offset + c);
    S::store(logits + (c - cols.begin), logit);
    largest = logit > largest ? logit : largest;
    const typename S::Int padding = index >= typename Lanes<T>::Bits(tile.count);
    index += typename Lanes<T>::Bits(S::kLanes);
    at_or_below += ((phi + S::load(tile.terms.bias + c)) <= target_score) | padding;
    if constexpr (kOmega) sum += padding ? Vec{} : S::load(tile.terms.omega + c) * logit;
  }

  // Second pass: exponentials against the maximum; all logits -inf leaves a sum of zero.
  const T max = S::reduce_max(largest);
  const T shift = max == -std::numeric_limits<T>::infinity() ? T(0) : max;
  Vec sum_exp{};
  for (int64_t c = 0; c < cols.end - cols.begin; c += S::kLanes)
    sum_exp += S::exp(S::load(logits + c) - shift);

  int64_t rank = cols.end - cols.begin;
  for (int64_t i = 0; i < S::kLanes; ++i) rank += at_or_below[i];
  tile.max[n] = max;
  tile.sum_exp[n] = S::reduce_add(sum_exp);
  tile.rank[n] = rank;
  if constexpr (kOmega) tile.sum[n] = S::reduce_add(sum);
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
  const T x_rnorm = tile.x_rnorm[n], max = tile.max[n];
  const T a = tile.grad_lse[n], b = tile.grad_target[n], s = kOmega ? tile.grad_sum[n] : T(0);
  const T a_over_sum = a / tile.sum_exp[n];
  if (a == 0 && b == 0 && s == 0) {  // an ignored row
    for (int64_t c = cols.begin; c < cols.end; c += S::kLanes) S::store(grad + c, Vec{});
    tile.row_dot[n] = tile.row_scale[n] = 0;
    return;
  }

  const typename S::Int label = S::iota() * 0 + typename Lanes<T>::Bits(tile.label[n]);
  typename S::Int index = S::iota() + typename Lanes<T>::Bits(cols.begin);
  Vec row_dot{}, row_scale{};
  for (int64_t c = cols.begin; c < cols.end; c += S::kLanes) {
    // Recompute the logit from the product, to the bit as the forward pass had it.
    const Vec rnorm = S::load(tile.terms.weight_rnorm + c) * x_rnorm;
    const Vec cosine = clamp_cosine(S::load(product + c) * rnorm);
    const auto sim = similarity_with_gradient(cosine, S::load(tile.terms.kappa + c));
    const Vec logit = sim.phi * tile.scale + S::load(tile.terms.offset + c);

    // g = dL/dlogit, t = dL/dcosine
    Vec g = S::exp(logit - max) * a_over_sum;
    g = index == label ? g + b : g;
    index += typename Lanes<T>::Bits(S::kLanes);
    if constexpr (kOmega) g += S::load(tile.terms.omega + c) * s;
    const Vec t = g * tile.scale * sim.dphi_dcosine;

    S::store(grad + c, t * rnorm);
    row_dot += t * cosine;
    row_scale += g * (sim.phi + S::load(tile.terms.bias + c));
    S::store(tile.col_dot + c, S::load(tile.col_dot + c) + t * cosine);
    if constexpr (kClassSums) {
      S::store(tile.col_bias + c, S::load(tile.col_bias + c) + g);
      S::store(tile.col_kappa + c, S::load(tile.col_kappa + c) + g * sim.dphi_dkappa);
    }
  }
  tile.row_dot[n] = S::reduce_add(row_dot);
  tile.row_scale[n] = S::reduce_add(row_scale);
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

template <class T>
void project(const T* rows, int64_t ld_rows, const T* factor, int64_t count, int64_t D, T* out,
             int64_t ld_out) {
  using S = Simd<T>;
  for (int64_t i = 0; i < count; ++i) {
    const T* in = rows + i * ld_rows;
    T* to = out + i * ld_out;
    int64_t d = 0;
    for (; d + S::kLanes <= D; d += S::kLanes)
      S::store(to + d, S::load(to + d) - S::load(in + d) * factor[i]);
    for (; d < D; ++d) to[d] -= in[d] * factor[i];
  }
}

template <class T>
void add(const T* in, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] += in[i];
}

template <class T>
constexpr TileKernels<T> kTable{rnorm<T>,    dot<T>,     score<T>, forward<T>,
                                backward<T>, project<T>, add<T>};

}  // namespace

extern const TileKernels<float> kFloat;
extern const TileKernels<double> kDouble;
const TileKernels<float> kFloat = kTable<float>;
const TileKernels<double> kDouble = kTable<double>;

}  // namespace tvmf::TVMF_ISA
