// The products of panels.h for pairs of bfloat16 by AMX. A panel of 16 rows of pairs is a tile as
// it lies in memory. Up to 32 rows and two panels of the result are summed at a time, in four
// tiles.
#include <algorithm>

#include "cpu/amx.h"
#include "cpu/panels.h"
#include "problem.h"

namespace tvmf::cpu::amx_bf16 {

void multiply(const PanelProduct& product);
void multiply_transposed(const PanelProduct& product);

namespace {

constexpr int64_t kTile = kPanel * kPanel;          // elements in a tile
constexpr int64_t kRow = kPanel * sizeof(float);    // bytes between two of its rows
constexpr int64_t kRows = 2 * kPanel;               // of a block of four tiles
constexpr int64_t kMaxTiles = kPairDepth / kPanel;  // that a sum runs over between two stores

// A block of the result and its operands, of which each is `tiles` tiles long.
struct Block {
  int64_t tiles;
  const float* a;
  int64_t a_rows, a_next;  // distances of the next 16 rows, and of the next tile in the sum
  const float* b;
  int64_t b_distance;
  float* out;
  int64_t out_distance;
  bool add;
};

// Tiles 0 to 3 are the sums, by rows; 4 and 5 are of `a`, 6 and 7 of `b`.
template <bool kTwoRows, bool kTwoPanels>
void multiply_block(const Block& o) {
  float* const lower = o.out + kTile;
  if (o.add) {
    amx::load<0>(o.out, kRow);
    if constexpr (kTwoPanels) amx::load<1>(o.out + o.out_distance, kRow);
    if constexpr (kTwoRows) amx::load<2>(lower, kRow);
    if constexpr (kTwoRows && kTwoPanels) amx::load<3>(lower + o.out_distance, kRow);
  } else {
    amx::zero<0>();
    if constexpr (kTwoPanels) amx::zero<1>();
    if constexpr (kTwoRows) amx::zero<2>();
    if constexpr (kTwoRows && kTwoPanels) amx::zero<3>();
  }
  const float *a = o.a, *b = o.b;
  for (int64_t k = 0; k < o.tiles; ++k, a += o.a_next, b += kTile) {
    amx::load<4>(a, kRow);
    amx::load<6>(b, kRow);
    amx::multiply_add<0, 4, 6>();
    if constexpr (kTwoPanels) {
      amx::load<7>(b + o.b_distance, kRow);
      amx::multiply_add<1, 4, 7>();
    }
    if constexpr (kTwoRows) {
      amx::load<5>(a + o.a_rows, kRow);
      amx::multiply_add<2, 5, 6>();
      if constexpr (kTwoPanels) amx::multiply_add<3, 5, 7>();
    }
  }
  amx::store<0>(o.out, kRow);
  if constexpr (kTwoPanels) amx::store<1>(o.out + o.out_distance, kRow);
  if constexpr (kTwoRows) amx::store<2>(lower, kRow);
  if constexpr (kTwoRows && kTwoPanels) amx::store<3>(lower + o.out_distance, kRow);
}

// The shapes of the tiles of a block of `rows` rows, where a tile of `a` has `depth` columns.
void configure(int64_t rows, int64_t depth) {
  amx::TileShapes shapes;
  const auto set = [&](int tile, int64_t rows, int64_t columns) {
    shapes.rows[tile] = rows;
    shapes.row_bytes[tile] = rows ? columns * sizeof(float) : 0;
  };
  const int64_t upper = std::min(rows, kPanel), lower = rows - upper;
  for (int j = 0; j < 2; ++j) {
    set(j, upper, kPanel);
    set(2 + j, lower, kPanel);
    set(6 + j, depth, kPanel);
  }
  set(4, upper, depth);
  set(5, lower, depth);
  amx::configure(shapes);
}

using Lanes = float __attribute__((vector_size(kRow)));
using Indices = int32_t __attribute__((vector_size(kRow)));

// out[i, k] = in[k, i] of 16 x 16 elements, in four steps. The step of width w exchanges the blocks
// of w x w beside the diagonal of every block of 2 w x 2 w.
void transpose(const float* in, int64_t rows, float* out) {
  Lanes v[kPanel]{};
  for (int64_t k = 0; k < rows; ++k) __builtin_memcpy(&v[k], in + k * kPanel, kRow);
#pragma GCC unroll 4
  for (int w = 1; w < kPanel; w *= 2) {
    Indices first, second;
    for (int i = 0; i < kPanel; ++i) {
      first[i] = i & w ? kPanel + i - w : i;
      second[i] = i & w ? kPanel + i : i + w;
    }
#pragma GCC unroll 16
    for (int k = 0; k < kPanel; ++k) {
      if (k & w) continue;
      const Lanes a = v[k], b = v[k + w];
      v[k] = __builtin_shuffle(a, b, first);
      v[k + w] = __builtin_shuffle(a, b, second);
    }
  }
  for (int64_t i = 0; i < kPanel; ++i) __builtin_memcpy(out + i * kPanel, &v[i], kRow);
}

template <bool kTransposed>
void multiply(const PanelProduct& p) {
  alignas(64) float turned[kTransposed ? kRows / kPanel * kMaxTiles * kTile : 1];
  for (int64_t k = 0, depth; k == 0 || k < p.depth; k += depth) {
    // What does not fill a tile is a step of its own, with tiles of fewer columns.
    const int64_t rest = p.depth - k, whole = rest / kPanel * kPanel;
    depth = whole ? std::min(whole, kPairDepth) : std::max<int64_t>(rest, 1);
    const int64_t tiles = rest ? ceil_div(depth, kPanel) : 0;
    for (int64_t row = 0; row < p.rows; row += kRows) {
      const int64_t rows = std::min(kRows, p.rows - row);
      configure(rows, std::min(depth, kPanel));
      Block o{.tiles = tiles,
              .a = p.a + k / kPanel * p.a_distance + row * kPanel,
              .a_rows = kTile,
              .a_next = p.a_distance,
              .b = nullptr,
              .b_distance = p.b_distance,
              .out = nullptr,
              .out_distance = p.out_distance,
              .add = p.add || k > 0};
      if constexpr (kTransposed) {
        for (int64_t i = 0; i * kPanel < rows; ++i)
          for (int64_t t = 0; t < tiles; ++t)
            transpose(p.a + (row / kPanel + i) * p.a_distance + (k + t * kPanel) * kPanel,
                      std::min(depth, kPanel), turned + (i * kMaxTiles + t) * kTile);
        o.a = turned;
        o.a_rows = kMaxTiles * kTile;
        o.a_next = kTile;
      }
      for (int64_t j = 0; j < p.panels; j += 2) {
        const bool two_panels = j + 1 < p.panels, two_rows = rows > kPanel;
        o.b = p.b + j * p.b_distance + k * kPanel;
        o.out = p.out + j * p.out_distance + row * kPanel;
        (two_rows     ? two_panels ? multiply_block<true, true> : multiply_block<true, false>
         : two_panels ? multiply_block<false, true>
                      : multiply_block<false, false>)(o);
      }
    }
  }
  amx::release();
}

}  // namespace

void multiply(const PanelProduct& product) { multiply<false>(product); }
void multiply_transposed(const PanelProduct& product) { multiply<true>(product); }

}  // namespace tvmf::cpu::amx_bf16
