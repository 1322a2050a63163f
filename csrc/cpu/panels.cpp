// Products of matrices in panels, by register blocks of a few rows and one to three panels. CMake
// compiles this file once for each instruction set, which TVMF_ISA names; TVMF_PAIRS makes elements
// pairs of bfloat16. Each sum adds its elements in order by fused multiply-adds, so that all sets
// that have these give the same bits.
#include "cpu/panels.h"

#include <algorithm>
#include <array>
#include <utility>

#include "cpu/simd.h"
#include "problem.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace tvmf::cpu::TVMF_ISA {
namespace {

using S = Simd<float>;
constexpr int64_t kVectors = kPanel / S::kWidth;  // in a row of a panel

// The most rows and panels of a register block. Its sums, the vectors of b and one element of a
// fit the registers, and enough sums are independent to hide the latency of a multiply-add.
#if defined(__AVX512F__)
constexpr int kMaxRows = 8, kMaxPanels = 3;
#elif defined(__AVX2__)
constexpr int kMaxRows = 6, kMaxPanels = 1;
#else
constexpr int kMaxRows = 3, kMaxPanels = 1;
#endif

#ifdef TVMF_PAIRS

// bfloat16 is the upper half of a float; round to nearest, ties to even.
inline uint32_t rounded(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return value == value ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x10000;
}

// A pair, whose first number is in the lower half.
inline float pair(float first, float second) {
  return std::bit_cast<float>(rounded(first) >> 16 | (rounded(second) & 0xffff0000));
}

struct Element {
  static constexpr int64_t kNumbers = 2, kDepth = kPairDepth;

  // One instruction adds both products of a pair, the second one first, and rounds after each.
  static S::Vec multiply_add(float a, S::Vec b, S::Vec sum) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(_mm512_set1_ps(a)),
                            std::bit_cast<__m512bh>(b));
#else
    const uint32_t pair = std::bit_cast<uint32_t>(a);
    const S::Int pairs = std::bit_cast<S::Int>(b);
    sum = std::bit_cast<float>(pair & 0xffff0000) *
              std::bit_cast<S::Vec>(pairs & int32_t(0xffff0000)) +
          sum;
    return std::bit_cast<float>(pair << 16) * std::bit_cast<S::Vec>(pairs << 16) + sum;
#endif
  }
};

#else

struct Element {
  static constexpr int64_t kNumbers = 1, kDepth = kFloatDepth;
  static S::Vec multiply_add(float a, S::Vec b, S::Vec sum) { return a * b + sum; }
};

#endif

// out (+)= a b for a register block, whose operands begin at the pointers.
template <bool kTransposed, int kRows, int kPanels>
void block(int64_t depth, const float* a, int64_t a_distance, const float* b, int64_t b_distance,
           float* out, int64_t out_distance, bool add) {
  constexpr int kCols = kPanels * kVectors;
  S::Vec sums[kRows][kCols]{};
  const auto step = [&](const float* a, const float* b) __attribute__((always_inline)) {
    S::Vec right[kCols];
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j)
      right[j] = S::load(b + j / kVectors * b_distance + j % kVectors * S::kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float left = a[kTransposed ? i : i * kPanel];
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j)
        sums[i][j] = Element::multiply_add(left, right[j], sums[i][j]);
    }
  };
  if constexpr (kTransposed) {
    for (int64_t k = 0; k < depth; ++k) step(a + k * kPanel, b + k * kPanel);
  } else {
    for (; depth > 0; depth -= kPanel, a += a_distance, b += kPanel * kPanel) {
      const int64_t count = std::min(depth, kPanel);
      for (int64_t k = 0; k < count; ++k) step(a + k, b + k * kPanel);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) {
      float* to = out + j / kVectors * out_distance + i * kPanel + j % kVectors * S::kWidth;
      S::store(to, add ? S::load(to) + sums[i][j] : sums[i][j]);
    }
}

using Block = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t,
                       bool);

// The blocks of every size, [kMaxRows, kMaxPanels].
template <bool kTransposed>
constexpr auto kBlocks = []<size_t... i>(std::index_sequence<i...>) {
  return std::array<Block, sizeof...(i)>{
      block<kTransposed, i / kMaxPanels + 1, i % kMaxPanels + 1>...};
}(std::make_index_sequence<kMaxRows * kMaxPanels>());

// `size` in as few parts of at most `most` as possible, whose sizes differ by at most one.
struct Parts {
  Parts(int64_t size, int64_t most)
      : count(ceil_div(size, most)), base(size / count), larger(size % count) {}
  int64_t begin(int64_t i) const { return i * base + std::min(i, larger); }
  int64_t count, base, larger;
};

template <bool kTransposed>
void multiply(const PanelProduct& p) {
  if (p.rows == 0) return;
  const Parts panels(p.panels, kMaxPanels);
  // A block of a transposed matrix does not cross the border of two panels.
  const int64_t group = kTransposed ? kPanel : p.rows;
  for (int64_t k = 0; k == 0 || k < p.depth; k += Element::kDepth) {
    const int64_t depth = std::min(Element::kDepth, p.depth - k);
    for (int64_t j = 0; j < panels.count; ++j) {
      const int64_t panel = panels.begin(j), width = panels.begin(j + 1) - panel;
      const float* b = p.b + panel * p.b_distance + k * kPanel;
      for (int64_t first = 0; first < p.rows; first += group) {
        const Parts rows(std::min(group, p.rows - first), kMaxRows);
        for (int64_t i = 0; i < rows.count; ++i) {
          const int64_t at = rows.begin(i), height = rows.begin(i + 1) - at, row = first + at;
          const float* a = kTransposed ? p.a + first / kPanel * p.a_distance + k * kPanel + at
                                       : p.a + k / kPanel * p.a_distance + row * kPanel;
          kBlocks<kTransposed>[(height - 1) * kMaxPanels + width - 1](
              depth, a, p.a_distance, b, p.b_distance, p.out + panel* p.out_distance + row* kPanel,
              p.out_distance, p.add || k > 0);
        }
      }
    }
  }
}

// out[k] = element(k) for k < count, then zeros up to 16.
template <class F>
inline void fill_panel(int64_t count, float* out, const F& element) {
  if (count >= kPanel) {
    for (int64_t k = 0; k < kPanel; ++k) out[k] = element(k);
  } else {
    std::fill(out, out + kPanel, 0.f);
    for (int64_t k = 0; k < count; ++k) out[k] = element(k);
  }
}

void pack_row(const float* row, int64_t cols, float* out, int64_t distance) {
  constexpr int64_t kStep = kPanel * Element::kNumbers;
  int64_t k = 0;
  for (; k < cols; k += kStep, row += kStep, out += distance) {
#ifdef TVMF_PAIRS
    const int64_t rest = cols - k;
    fill_panel(rest / 2, out, [&](int64_t i) { return pair(row[2 * i], row[2 * i + 1]); });
    if (rest < kStep && rest % 2) out[rest / 2] = pair(row[rest - 1], 0);
#else
    fill_panel(cols - k, out, [&](int64_t i) { return row[i]; });
#endif
  }
}

void pack_rows(const float* rows, int64_t row_stride, [[maybe_unused]] int64_t count, int64_t cols,
               float* out, int64_t distance) {
  // The rows are pieces of longer ones, too short for the hardware to see where the next one is.
  constexpr int64_t kAhead = 4;
  const float* later = rows + kAhead * row_stride;
  for (int64_t k = 0; k < cols; k += kPanel) __builtin_prefetch(later + k);
  for (int64_t k = 0; k < cols; k += kPanel, rows += kPanel, out += distance) {
#ifdef TVMF_PAIRS
    if (count == 1)
      fill_panel(cols - k, out, [&](int64_t i) { return pair(rows[i], 0); });
    else
      fill_panel(cols - k, out, [&](int64_t i) { return pair(rows[i], rows[row_stride + i]); });
#else
    fill_panel(cols - k, out, [&](int64_t i) { return rows[i]; });
#endif
  }
}

void pack_columns(const float* rows, int64_t row_stride, int64_t count, int64_t cols, float* out) {
  // Pieces of the rows stay in the first-level cache until all of their lines are used.
  const int64_t elements = ceil_div(cols, Element::kNumbers);
  float piece[kPanel][kPanel]{};  // rows that are missing stay 0
  for (int64_t begin = 0; begin < elements; begin += kPanel) {
    const int64_t first = begin * Element::kNumbers, last = std::min(elements, begin + kPanel);
    for (int64_t i = 0; i < count; ++i)
      pack_row(rows + i * row_stride + first, std::min(cols - first, kPanel * Element::kNumbers),
               piece[i], 0);
    for (int64_t k = begin; k < last; ++k)
      for (int64_t i = 0; i < kPanel; ++i) out[k * kPanel + i] = piece[i][k - begin];
  }
}

#ifdef TVMF_PAIRS
void pack_pairs(const float* panel, int64_t count, float* of_columns, float* of_rows) {
  for (int64_t c = 0; c < count; ++c) {
    const float* row = panel + c * kPanel;
    for (int64_t i = 0; i < kPanel / 2; ++i)
      of_columns[c * kPanel + i] = pair(row[2 * i], row[2 * i + 1]);
  }
  for (int64_t c = 0; c < count; c += 2)
    pack_rows(panel + c * kPanel, kPanel, std::min<int64_t>(2, count - c), kPanel,
              of_rows + c / 2 * kPanel, 0);
}
#else
constexpr auto pack_pairs = nullptr;
#endif

}  // namespace

extern const PanelKernels kPanels;
const PanelKernels kPanels{.per_element = Element::kNumbers,
                           .multiply = multiply<false>,
                           .multiply_transposed = multiply<true>,
                           .pack_row = pack_row,
                           .pack_rows = pack_rows,
                           .pack_columns = pack_columns,
                           .pack_pairs = pack_pairs};

}  // namespace tvmf::cpu::TVMF_ISA
