// Vectors of one instruction set, which TVMF_ISA names, and the exponential of such a vector. Only
// files that CMake compiles once for each instruction set include this.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

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
#if defined(__AVX512F__) || defined(TVMF_EMULATED)
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

}  // namespace
}  // namespace tvmf::cpu::TVMF_ISA
