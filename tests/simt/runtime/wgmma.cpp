// wgmma. Operands are read, and their order checked, both when an instruction is issued and when it
// is finished at the wait, which are the earliest and the latest time that hardware may read them.
#include <algorithm>

#include "internal.h"

namespace simt {
namespace {

// The wgmma that each warpgroup has issued. All its warps must issue the same sequence.
std::vector<std::vector<Wgmma>> issued_by_warpgroup;

using WideRow = float __attribute__((vector_size(32)));

// sum = A B, or sum += A B where `add`, with A [16, 16] and B [16, cols]. No multiply-add is fused.
__attribute__((always_inline)) inline void multiply_rows(float (*sum)[256], const float (*a)[16],
                                                         const float (*b)[256], int cols,
                                                         bool add) {
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < cols; j += 16) {
      WideRow acc[4][2] = {};
      for (int k = 0; k < 16; ++k) {
        WideRow w[2];
        memcpy(w, &b[k][j], sizeof w);
        for (int r = 0; r < 4; ++r)
          for (int h = 0; h < 2; ++h) acc[r][h] += a[i + r][k] * w[h];
      }
      for (int r = 0; r < 4; ++r) {
        WideRow before[2] = {};
        if (add) memcpy(before, &sum[i + r][j], sizeof before);
        for (int h = 0; h < 2; ++h) before[h] += acc[r][h];
        memcpy(&sum[i + r][j], before, sizeof before);
      }
    }
}
using MultiplyRows = void(float (*)[256], const float (*)[16], const float (*)[256], int, bool);
void multiply_rows_baseline(float (*sum)[256], const float (*a)[16], const float (*b)[256],
                            int cols, bool add) {
  multiply_rows(sum, a, b, cols, add);
}
#ifdef __x86_64__
__attribute__((target("avx2"))) void multiply_rows_avx2(float (*sum)[256], const float (*a)[16],
                                                        const float (*b)[256], int cols, bool add) {
  multiply_rows(sum, a, b, cols, add);
}
MultiplyRows* const multiply_rows_best = (__builtin_cpu_init(), __builtin_cpu_supports("avx2"))
                                             ? multiply_rows_avx2
                                             : multiply_rows_baseline;
#else
MultiplyRows* const multiply_rows_best = multiply_rows_baseline;
#endif

// Calls f(line, chunk, address) for every chunk of 16 bytes of an operand that has `extent` rows
// (A) or columns (B) and a depth of 16. There is one line for each row or column, or, in a
// transposed operand, one for each step of the depth.
template <class F>
__attribute__((always_inline)) inline void for_chunks(uint64_t descriptor, bool transposed,
                                                      int extent, const F& f) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  const auto at_address = [&](uint32_t address) {
    return shared + (int64_t(address ^ (address >> 7 & 7) << 4) - kSharedBase);
  };
  if (!transposed) {
    for (int mn = 0; mn < extent; ++mn)
      for (int c = 0; c < 2; ++c)
        f(mn, c, at_address(start + mn / 8 * stride + mn % 8 * 128 + c * 16));
  } else {
    for (int k = 0; k < 16; ++k)
      for (int c = 0; c < extent / 8; ++c)
        f(k, c, at_address(start + c / 8 * leading + k / 8 * stride + k % 8 * 128 + c % 8 * 16));
  }
}

// The descriptor of the warp's own 16 of the 64 rows of A.
uint64_t descriptor_of_a(const Wgmma& w, int warp) {
  const int first = warp % 4 * 16;
  const uint64_t stride = w.a_descriptor >> 32 & 0x3fff;
  return w.a_descriptor + (w.transposed_a ? first * 2 / 16 : first / 8 * stride);
}

// Checks that an operand lies in shared memory and that no write to it can happen at the same time.
// Adjacent chunks are checked together.
void check_operand(int warp, uint64_t descriptor, bool transposed, int extent, bool finished,
                   const void* site) {
  const Thread& thread = threads[warp * 32];
  if (descriptor >> 62 != 1) fail("the wgmma descriptor lacks the 128-byte swizzle", at(site));
  const bool watching = watched && options.check_races;
  const Mark now{block, warps[warp].clock + 1, watching ? site_of(site, kWgmmaRead, true) : 0,
                 actor_of_warp(warp), false};
  uint64_t from = 0, to = 0;
  const auto check = [&] {
    if (to > from) check_order(thread, now, from, to - from, finished);
  };
  for_chunks(descriptor, transposed, extent, [&](int, int, const char* chunk) {
    if (!inside_shared(chunk, 16))
      fail("wgmma reads shared memory + ", chunk - shared, " of ", shared_bytes, " bytes",
           at(site));
    if (!watching) return;
    const uint64_t offset = chunk - arena;
    if (offset == to) {
      to += 16;
    } else if (offset + 16 == from) {
      from -= 16;
    } else {
      check();
      from = offset;
      to = offset + 16;
    }
  });
  check();
}

void to_floats(float* out, const uint16_t* in, int count, MmaKind kind) {
  if (kind == kBf16)
    for (int i = 0; i < count; ++i) out[i] = from_bf16(in[i]);
  else
    for (int i = 0; i < count; ++i) out[i] = from_f16(in[i]);
}

// An operand as floats, value[k][row or column], and the bytes from which they were converted. Most
// often another warp has just converted the same bytes, so the last results are kept.
struct Converted {
  uint64_t descriptor;
  int extent;
  bool transposed;
  MmaKind kind;
  uint16_t raw[16 * 256];
  float value[16][256];
};

const Converted& convert(uint64_t descriptor, bool transposed, int extent, MmaKind kind) {
  static std::vector<Converted> cache(64);
  static uint16_t raw[16 * 256];
  for_chunks(descriptor, transposed, extent, [&](int line, int chunk, const char* from) {
    memcpy(raw + (transposed ? line * extent : line * 16) + chunk * 8, from, 16);
  });
  Converted& c = cache[(descriptor & 0x3fff) * 0x9e3779b97f4a7c15 >> 58];
  const size_t bytes = 32 * extent;
  if (c.descriptor == descriptor && c.transposed == transposed && c.extent == extent &&
      c.kind == kind && !memcmp(c.raw, raw, bytes))
    return c;
  c.descriptor = descriptor;
  c.extent = extent;
  c.transposed = transposed;
  c.kind = kind;
  memcpy(c.raw, raw, bytes);
  if (transposed) {
    for (int k = 0; k < 16; ++k) to_floats(c.value[k], raw + k * extent, extent, kind);
  } else {
    static float lines[16 * 256];
    to_floats(lines, raw, 16 * extent, kind);
    for (int mn = 0; mn < extent; ++mn)
      for (int k = 0; k < 16; ++k) c.value[k][mn] = lines[mn * 16 + k];
  }
  return c;
}

// A lane holds in accumulators 4 j to 4 j + 3 the columns 8 j + lane % 4 * 2 and the next one,
// first of row lane / 4 and then of row lane / 4 + 8.
__attribute__((no_sanitize("address", "undefined"))) void move_sums(Accumulators& sums,
                                                                    bool to_lanes) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < sums.cols / 2; i += 2) {
      float* const here = &sums.sum[lane / 4 + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2];
      float* const there = sums.lane[lane] + i;
      __builtin_memcpy(to_lanes ? there : here, to_lanes ? here : there, 8);
    }
}
__attribute__((no_sanitize("address", "undefined"))) void poison(const Accumulators& sums) {
  for (float* lane : sums.lane)
    for (int i = 0; i < sums.cols / 2; ++i) lane[i] = __builtin_nanf("");
}
__attribute__((no_sanitize("address", "undefined"))) void load_a(const PendingWgmma& pending,
                                                                 float (*a)[16]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e) {
        const uint16_t bits = pending.a[lane][i] >> 16 * e;
        a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + e] =
            pending.what.kind == kBf16 ? from_bf16(bits) : from_f16(bits);
      }
}

bool same(const Wgmma& a, const Wgmma& b) {
  return a.kind == b.kind && a.cols == b.cols && a.a_descriptor == b.a_descriptor &&
         a.b_descriptor == b.b_descriptor && a.transposed_a == b.transposed_a &&
         a.transposed_b == b.transposed_b && a.add == b.add && !a.a == !b.a;
}

// Takes the lanes' accumulators, or shares those that an unfinished wgmma of the warp has taken.
void take_accumulators(const Warp& warp, PendingWgmma& pending, const Operand* operand) {
  const Wgmma& w = pending.what;
  for (const PendingWgmma& other : warp.wgmma)
    if (other.accumulators->lane[0] == operand[0].out) pending.accumulators = other.accumulators;
  if (!warp.fenced && (w.a || !pending.accumulators))
    fail("the registers of this wgmma may have changed since wgmma_fence", at(pending.site));
  if (!pending.accumulators) {
    pending.accumulators = std::make_shared<Accumulators>();
    Accumulators& fresh = *pending.accumulators;
    fresh.cols = w.cols;
    for (int lane = 0; lane < 32; ++lane) fresh.lane[lane] = static_cast<float*>(operand[lane].out);
    if (w.add) move_sums(fresh, false);
    poison(fresh);
  }
  const Accumulators& sums = *pending.accumulators;
  for (int lane = 0; lane < 32; ++lane)
    if (sums.lane[lane] != operand[lane].out || sums.cols != w.cols)
      fail("unfinished wgmma share some of their accumulators, but not all", at(pending.site));
  ++pending.accumulators->pending;
}

void finish_wgmma(int number, const PendingWgmma& pending) {
  const Wgmma& w = pending.what;
  float a[16][16];
  if (w.a) {
    load_a(pending, a);
  } else {
    const uint64_t descriptor = descriptor_of_a(w, number);
    check_operand(number, descriptor, w.transposed_a, 16, true, pending.site);
    const Converted& from = convert(descriptor, w.transposed_a, 16, w.kind);
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k) a[i][k] = from.value[k][i];
  }
  check_operand(number, w.b_descriptor, w.transposed_b, w.cols, true, pending.site);
  const Converted& b = convert(w.b_descriptor, w.transposed_b, w.cols, w.kind);
  Accumulators& sums = *pending.accumulators;
  multiply_rows_best(sums.sum, a, b.value, w.cols, w.add);
  if (--sums.pending == 0) move_sums(sums, true);
}

}  // namespace

void start_wgmma() {
  for (Warp& warp : warps) {
    warp.wgmma.clear();
    warp.committed_groups = warp.issued = warp.clock = 0;
    warp.fenced = false;
  }
  issued_by_warpgroup.assign((blockDim.x + 127) / 128, {});
}

void issue_wgmma(int number, const Operand* operand) {
  Warp& warp = warps[number];
  const void* site = self->site;
  if ((number / 4 + 1) * 128 > int(blockDim.x))
    fail("wgmma needs a whole warpgroup of 128 threads", at(site));
  PendingWgmma pending{
      *static_cast<const Wgmma*>(operand[0].in), {}, nullptr, warp.committed_groups, site};
  const Wgmma& w = pending.what;
  for (int lane = 0; lane < 32; ++lane) {
    const Wgmma& other = *static_cast<const Wgmma*>(operand[lane].in);
    if (!same(w, other)) fail("the lanes of a warp give wgmma different operands", at(site));
    pending.a[lane] = other.a;
  }
  std::vector<Wgmma>& issued = issued_by_warpgroup[number / 4];
  if (warp.issued == int(issued.size())) issued.push_back(w);
  if (!same(issued[warp.issued++], w))
    fail("the warps of a warpgroup give wgmma different operands", at(site));
  take_accumulators(warp, pending, operand);
  if (!w.a) check_operand(number, descriptor_of_a(w, number), w.transposed_a, 16, false, site);
  check_operand(number, w.b_descriptor, w.transposed_b, w.cols, false, site);
  record->report.wgmma += number % 4 == 0;
  warp.wgmma.push_back(pending);
}

void wait_wgmma(int number, int groups) {
  Warp& warp = warps[number];
  auto pending = warp.wgmma.begin();
  for (; pending != warp.wgmma.end() && pending->group < warp.committed_groups - groups; ++pending)
    finish_wgmma(number, *pending);
  if (pending == warp.wgmma.begin()) return;
  warp.wgmma.erase(warp.wgmma.begin(), pending);
  warp.fenced = false;
  if (!options.check_races) return;
  Clocks finished(actors_of_block());
  finished[actor_of_warp(number)] = ++warp.clock;
  const auto clocks = std::make_shared<const Clocks>(std::move(finished));
  for (int lane = 0; lane < 32; ++lane) acquire(threads[number * 32 + lane], clocks);
}

void check_wgmma_at_exit() {
  for (int number = 0; number < int(blockDim.x / 32); ++number) {
    const Warp& warp = warps[number];
    if (!warp.wgmma.empty())
      fail("warp ", number, " exits without waiting for its wgmma", at(warp.wgmma[0].site));
    const int first = number / 4 * 4;
    if (warp.issued != warps[first].issued)
      fail("warps ", first, " and ", number,
           " of a warpgroup have issued different numbers of wgmma");
  }
}

}  // namespace simt
