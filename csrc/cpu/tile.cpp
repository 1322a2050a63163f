// The tile kernels in portable vector code: cosine -> phi -> logit -> row statistics, and back.
// CMake compiles this file once for each instruction set and names it in TVMF_ISA. All sets give
// the same bits, because each keeps its sums in 64 bytes of lanes and fuses no multiplication with
// an addition.
#include "cpu/tile.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "similarity.h"

namespace tvmf::cpu::TVMF_ISA {
namespace {

// What the exponential needs to know of a type.
template <class T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  using Bits = int32_t;
  static constexpr int kMantissa = 23, kExponentBias = 127, kExpTerms = 7;
  static constexpr float kExpMin = -87.f;
  static constexpr float kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;
};

template <>
struct ExpTraits<double> {
  using Bits = int64_t;
  static constexpr int kMantissa = 52, kExponentBias = 1023, kExpTerms = 13;
  static constexpr double kExpMin = -708.;
  static constexpr double kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
};

// The widest vectors of the instruction set. GCC splits comparisons, selections and conversions of
// wider vectors into operations on single elements.
#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

// Every instruction set keeps kLanes sums side by side, so that all of them add in the same order.
// A loop over columns runs once for each vector of those lanes, whose values then fit the
// registers.
template <class T>
struct Simd {
  static constexpr int64_t kLanes = 64 / sizeof(T), kWidth = kVectorBytes / sizeof(T);
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  typedef typename ExpTraits<T>::Bits Int __attribute__((vector_size(kVectorBytes)));

  static inline Vec load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static inline void store(T* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }

  static inline Vec iota() {
    Vec v;
    for (int64_t i = 0; i < kWidth; ++i) v[i] = T(i);
    return v;
  }

  // 1 / k!
  static constexpr auto kTaylor = [] {
    std::array<T, ExpTraits<T>::kExpTerms + 1> terms{T(1)};
    for (size_t k = 1; k < terms.size(); ++k) terms[k] = terms[k - 1] / k;
    return terms;
  }();

  // The sum of r^k / (k + kFirst)! over k < kCount; `powers` are r, r^2, r^4, r^8.
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
    using L = ExpTraits<T>;
    // The addition of this number rounds to an integer, and leaves it in the low bits of the sum.
    constexpr T kRound = T(3) * (int64_t(1) << (L::kMantissa - 1));
    const Vec rounded = x * T(1.4426950408889634) + kRound;
    const Vec n = rounded - kRound;
    const Vec r = (x - n * L::kLn2High) - n * L::kLn2Low;
    // 1 + (r + r^2 (1/2! + r/3! + ...)). The bracket is evaluated by halves, because Horner's
    // scheme would make a dependent chain twice as long, and such chains take most of a tile's
    // time.
    const Vec square = r * r, fourth = square * square;
    const Vec powers[] = {r, square, fourth, fourth * fourth};
    const Vec series = (r + square * polynomial<2, L::kExpTerms - 1>(powers)) + T(1);
    const Int exponent = (std::bit_cast<Int>(rounded) + L::kExponentBias) << L::kMantissa;
    return x < L::kExpMin ? Vec{} : series * std::bit_cast<Vec>(exponent);
  }
};

// The lanes of one sum or maximum, which are combined at the end of a loop.
template <class T>
struct LaneBuffer {
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
T dot(const T* a, const T* b, int64_t D) {
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
  LaneBuffer<T> lanes;
  for (int64_t i = 0; i < kVectors; ++i) lanes.put(i * S::kWidth, even[i] + odd[i]);
  return lanes.sum();
}

template <class T>
void rnorm(const T* rows, int64_t row_stride, int64_t count, int64_t D, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows + i * row_stride;
    const T norm = std::sqrt(dot(row, row, D));
    out[i] = T(1) / (norm < T(kEps) ? T(kEps) : norm);
  }
}

// As many numbers as a vector of float64 has, in float64.
template <class T>
inline Simd<double>::Vec load_double(const T* p) {
  typedef T Narrow __attribute__((vector_size(Simd<double>::kWidth * sizeof(T)),
                                  aligned(alignof(T)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Simd<double>::Vec);
}

template <class T>
TargetProduct target(const T* x, const T* w, int64_t D) {
  using S = Simd<double>;
  constexpr int64_t kVectors = S::kLanes / S::kWidth;
  S::Vec sums[3][kVectors]{};  // |x|^2, |w|^2, <x, w>
  const auto add_step = [&](const T* x, const T* w) {
    for (int64_t i = 0; i < kVectors; ++i) {
      const S::Vec a = load_double(x + i * S::kWidth), b = load_double(w + i * S::kWidth);
      sums[0][i] += a * a;
      sums[1][i] += b * b;
      sums[2][i] += a * b;
    }
  };
  int64_t d = 0;
  for (; d + S::kLanes <= D; d += S::kLanes) add_step(x + d, w + d);
  if (d < D) {
    T rest_x[S::kLanes]{}, rest_w[S::kLanes]{};
    std::copy(x + d, x + D, rest_x);
    std::copy(w + d, w + D, rest_w);
    add_step(rest_x, rest_w);
  }
  double total[3];
  for (int64_t k = 0; k < 3; ++k) {
    LaneBuffer<double> lanes;
    for (int64_t i = 0; i < kVectors; ++i) lanes.put(i * S::kWidth, sums[k][i]);
    total[k] = lanes.sum();
  }
  const double x_norm = std::sqrt(total[0]), w_norm = std::sqrt(total[1]);
  const double cosine =
      total[2] / (x_norm < kEps ? kEps : x_norm) / (w_norm < kEps ? kEps : w_norm);
  return {total[2], clamp_cosine(cosine)};
}

template <class T>
T score(T product, T x_rnorm, T weight_rnorm, T kappa, T bias) {
  const T cosine = clamp_cosine(product * (weight_rnorm * x_rnorm));
  return similarity(cosine, kappa) + bias;
}

template <class T, bool kWithSum, bool kWithTarget>
void forward_row(const ForwardTile<T>& tile, int64_t n, Range cols) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  const T* product = tile.product + n * tile.stride;
  const ClassTerms<T> terms = tile.terms;
  const T x_rnorm = tile.x_rnorm[n], target_score = tile.target_score[n], scale = tile.scale;
  const T count = T(tile.count);
  alignas(64) T logits[kStripe];
  LaneBuffer<T> largest_in, sum_in, sum_exp_in;

  const T target_column = T(tile.column[n]);

  // The first loop makes the logits, finds their maximum, and counts the classes that score at or
  // below the target. The target's own logit becomes -inf.
  int64_t rank = cols.end - cols.begin;
  for (int64_t lane = 0; lane < S::kLanes; lane += S::kWidth) {
    Vec largest = Vec{} - std::numeric_limits<T>::infinity(), sum{};
    Vec index = S::iota() + T(cols.begin + lane);
    typename S::Int at_or_below{};
    for (int64_t c = cols.begin + lane; c < cols.end; c += S::kLanes) {
      const Vec rnorm = S::load(terms.weight_rnorm + c) * x_rnorm;
      const Vec cosine = clamp_cosine(S::load(product + c) * rnorm);
      const Vec phi = similarity(cosine, S::load(terms.kappa + c));
      const Vec logit_of_class = phi * scale + S::load(terms.offset + c);
      Vec logit = logit_of_class;
      typename S::Int left_out = index >= count;
      if constexpr (kWithTarget) {
        const typename S::Int is_target = index == target_column;
        logit = is_target ? Vec{} - std::numeric_limits<T>::infinity() : logit;
        left_out |= is_target;
      }
      index += T(S::kLanes);
      S::store(logits + (c - cols.begin), logit);
      largest = logit > largest ? logit : largest;
      at_or_below += ((phi + S::load(terms.bias + c)) <= target_score) | left_out;
      if constexpr (kWithSum)
        sum += left_out ? Vec{} : S::load(terms.class_weight + c) * logit_of_class;
    }
    largest_in.put(lane, largest);
    sum_in.put(lane, sum);
    for (int64_t i = 0; i < S::kWidth; ++i) rank += at_or_below[i];
  }

  // The second loop sums the exponentials relative to the maximum. If all logits are -inf, the sum
  // is 0.
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
  if constexpr (kWithSum) tile.sum[n] = sum_in.sum();
}

inline bool contains(Range range, int64_t column) {
  return column >= range.begin && column < range.end;
}

template <class T, bool kWithSum>
void forward_rows(const ForwardTile<T>& tile, Range rows, Range cols) {
  for (int64_t n = rows.begin; n < rows.end; ++n)
    contains(cols, tile.column[n]) ? forward_row<T, kWithSum, true>(tile, n, cols)
                                   : forward_row<T, kWithSum, false>(tile, n, cols);
}

template <class T>
void forward(const ForwardTile<T>& tile, Range rows, Range cols) {
  tile.terms.class_weight ? forward_rows<T, true>(tile, rows, cols)
                          : forward_rows<T, false>(tile, rows, cols);
}

// Without the target, whose g counts as 0.
template <class T, bool kWithSum, bool kClassSums, bool kWithTarget>
void backward_others(const BackwardTile<T>& tile, int64_t n, Range cols) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  const T* product = tile.product + n * tile.stride;
  T* grad = tile.grad + n * tile.stride;
  const ClassTerms<T> terms = tile.terms;
  const RowGradient<T>& row = tile.gradient[n];
  const T x_rnorm = tile.x_rnorm[n], scale = tile.scale, s = kWithSum ? row.sum : T(0);
  // Where there is no other class, or all of them have a logit of -inf, the maximum is -inf and the
  // sum is 0.
  const T max = tile.max[n] == -std::numeric_limits<T>::infinity() ? T(0) : tile.max[n];
  const T a_over_sum = tile.sum_exp[n] == 0 ? T(0) : row.others / tile.sum_exp[n];
  const T target_column = T(tile.column[n]);
  T *col_dot = tile.col_dot, *col_bias = tile.col_bias, *col_kappa = tile.col_kappa;
  if (a_over_sum == 0 && s == 0) {  // an ignored row
    std::fill(grad + cols.begin, grad + cols.end, T(0));
    tile.row_dot[n] = tile.row_scale[n] = 0;
    return;
  }

  LaneBuffer<T> row_dot_in, row_scale_in;
  for (int64_t lane = 0; lane < S::kLanes; lane += S::kWidth) {
    Vec row_dot{}, row_scale{}, index = S::iota() + T(cols.begin + lane);
    for (int64_t c = cols.begin + lane; c < cols.end; c += S::kLanes) {
      // The logit is computed from the product again, to the bits of the forward pass.
      const Vec rnorm = S::load(terms.weight_rnorm + c) * x_rnorm;
      const Vec cosine = clamp_cosine(S::load(product + c) * rnorm);
      const auto sim = similarity_with_gradient(cosine, S::load(terms.kappa + c));
      const Vec logit = sim.phi * scale + S::load(terms.offset + c);

      // g = dL/dlogit, t = dL/dcosine
      Vec g = S::exp(logit - max) * a_over_sum;
      if constexpr (kWithSum) g += S::load(terms.class_weight + c) * s;
      if constexpr (kWithTarget) {
        g = index == target_column ? Vec{} : g;
        index += T(S::kLanes);
      }
      const Vec t = g * (scale * sim.dphi_dcosine);

      S::store(grad + c, t * rnorm);
      row_dot += t * cosine;
      row_scale += g * (sim.phi + S::load(terms.bias + c) - row.score);
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

template <class T, bool kWithSum, bool kClassSums>
void backward_rows(const BackwardTile<T>& tile, Range rows, Range cols) {
  for (int64_t n = rows.begin; n < rows.end; ++n) {
    const int64_t column = tile.column[n];
    if (!contains(cols, column)) {
      backward_others<T, kWithSum, kClassSums, false>(tile, n, cols);
      continue;
    }
    backward_others<T, kWithSum, kClassSums, true>(tile, n, cols);
    const RowGradient<T>& row = tile.gradient[n];
    const T dot = row.by_cosine * row.cosine;
    tile.grad[n * tile.stride + column] =
        row.by_cosine * (tile.terms.weight_rnorm[column] * tile.x_rnorm[n]);
    tile.row_dot[n] += dot;
    tile.col_dot[column] += dot;
    if constexpr (kClassSums) {
      tile.col_bias[column] += row.by_logit;
      tile.col_kappa[column] += row.by_phi_kappa;
    }
  }
}

template <class T>
void backward(const BackwardTile<T>& tile, Range rows, Range cols) {
  if (tile.terms.class_weight)
    tile.col_bias ? backward_rows<T, true, true>(tile, rows, cols)
                  : backward_rows<T, true, false>(tile, rows, cols);
  else
    tile.col_bias ? backward_rows<T, false, true>(tile, rows, cols)
                  : backward_rows<T, false, false>(tile, rows, cols);
}

template <class T, bool kAdd>
void multiply(const T* rows, int64_t row_stride, const T* factor, int64_t count, int64_t D,
              T* out) {
  using S = Simd<T>;
  for (int64_t i = 0; i < count; ++i) {
    const T* in = rows + i * row_stride;
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
constexpr TileKernels<T> kTable{.rnorm = rnorm<T>,
                                .target = target<T>,
                                .score = score<T>,
                                .forward = forward<T>,
                                .backward = backward<T>,
                                .multiply = multiply<T, false>,
                                .multiply_add = multiply<T, true>,
                                .add = add<T>};

}  // namespace

extern const TileKernels<float> kFloat;
extern const TileKernels<double> kDouble;
const TileKernels<float> kFloat = kTable<float>;
const TileKernels<double> kDouble = kTable<double>;

}  // namespace tvmf::cpu::TVMF_ISA
