// Barriers of a block and collectives of a warp. The last thread to arrive does the work for all,
// and then makes the others ready to run.
#include "internal.h"

namespace simt {

std::array<Warp, kMaxBlockThreads / 32> warps;

namespace {

struct NamedBarrier {
  int expected;
  std::vector<Thread*> arrived;
};
std::array<NamedBarrier, 16> named_barriers;

const char* const kCollectiveNames[] = {"__syncwarp",  "a shuffle",    "a vote",
                                        "ldmatrix",    "mma",          "wgmma",
                                        "wgmma_fence", "wgmma_commit", "wgmma_wait"};

// Hardware ignores the low bits of a tf32 operand.
float from_tf32(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

// D += A B with A [16, depth] and B [depth, 8]. A register holds one or two neighbours in k. The
// lanes' registers are valid memory, and this function takes most of the time, so the sanitizers
// leave it out.
template <class Element, float convert(Element)>
__attribute__((no_sanitize("address", "undefined"))) void multiply(const Operand* operand) {
  using Row = float __attribute__((vector_size(32)));
  constexpr int kWidth = 4 / sizeof(Element), kDepth = 8 * kWidth;
  Element a[16][kDepth], b[8][kDepth];
  float x[16][kDepth];
  Row w[kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, k = lane % 4 * kWidth;
    const uint32_t* from = static_cast<const uint32_t*>(operand[lane].in);
    for (int i = 0; i < 4; ++i)
      __builtin_memcpy(&a[row + i % 2 * 8][k + i / 2 * 4 * kWidth], from + i, 4);
    from = static_cast<const uint32_t*>(operand[lane].b);
    for (int i = 0; i < 2; ++i) __builtin_memcpy(&b[row][k + i * 4 * kWidth], from + i, 4);
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < kDepth; ++k) x[i][k] = convert(a[i][k]);
  for (int k = 0; k < kDepth; ++k)
    for (int j = 0; j < 8; ++j) w[k][j] = convert(b[j][k]);
  for (int i = 0; i < 16; ++i) {
    Row sum = {};
    for (int k = 0; k < kDepth; ++k) sum += x[i][k] * w[k];
    for (int j = 0; j < 8; ++j)
      static_cast<float*>(operand[i % 8 * 4 + j / 2].out)[i / 8 * 2 + j % 2] += sum[j];
  }
}

void multiply(MmaKind kind, const Operand* operand) {
  if (kind == kBf16) multiply<uint16_t, from_bf16>(operand);
  if (kind == kF16) multiply<uint16_t, from_f16>(operand);
  if (kind == kTf32) multiply<uint32_t, from_tf32>(operand);
}

void load_matrices(int warp, const Operand* operand) {
  uint16_t rows[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    if (reinterpret_cast<uintptr_t>(operand[lane].in) % 16)
      fail("the ldmatrix row of lane ", lane, " is not aligned to 16 bytes", at(self->site));
    note(threads[warp * 32 + lane], operand[lane].in, 16, kMatrixRead, self->site);
    memcpy(rows[lane], operand[lane].in, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    uint16_t (*out)[2] = static_cast<uint16_t (*)[2]>(operand[lane].out);
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i;
        out[matrix][i] = operand[lane].argument ? rows[matrix * 8 + column][row]
                                                : rows[matrix * 8 + row][column];
      }
  }
}

void shuffle_values(unsigned mask, std::span<const int> lanes, const Operand* operand) {
  for (int lane : lanes) {
    const Operand& to = operand[lane];
    if (!(mask >> to.argument & 1))
      fail("lane ", lane, " wants the value of lane ", to.argument, ", which is not in the mask",
           at(self->site));
    memcpy(to.out, operand[to.argument].in, to.bytes);
  }
}

void count_votes(std::span<const int> lanes, const Operand* operand) {
  unsigned votes = 0;
  for (int lane : lanes) votes |= unsigned(operand[lane].argument) << lane;
  for (int lane : lanes) *static_cast<unsigned*>(operand[lane].out) = votes;
}

void perform(int number, Collective what, unsigned mask) {
  Warp& warp = warps[number];
  const Operand* operand = warp.operand;
  int all[32], count = 0;
  for (unsigned left = mask; left; left &= left - 1) all[count++] = __builtin_ctz(left);
  const std::span<const int> lanes(all, count);
  switch (what) {
    case Collective::kSyncWarp: {
      std::vector<Thread*> members;
      for (int lane : lanes) members.push_back(&threads[number * 32 + lane]);
      return join_clocks(members);
    }
    case Collective::kShuffle: return shuffle_values(mask, lanes, operand);
    case Collective::kBallot: return count_votes(lanes, operand);
    case Collective::kLoadMatrix:
      ++record->report.load_matrix;
      return load_matrices(number, operand);
    case Collective::kMma:
      ++record->report.mma;
      return multiply(MmaKind(operand->argument), operand);
    case Collective::kWgmma: return issue_wgmma(number, operand);
    case Collective::kWgmmaFence: warp.fenced = true; return;
    case Collective::kWgmmaCommit:
      ++warp.committed_groups;
      warp.fenced = false;
      return;
    case Collective::kWgmmaWait: return wait_wgmma(number, operand->argument);
  }
}

void arrive_at(NamedBarrier& barrier, int expected) {
  Thread& thread = *self;
  if (barrier.arrived.empty()) barrier.expected = expected;
  if (barrier.expected != expected)
    fail("threads come to one barrier with different counts: ", who_waits_where());
  barrier.arrived.push_back(&thread);
  if (int(barrier.arrived.size()) < expected) return suspend();
  ++record->report.barriers;
  std::vector<Thread*> arrived;
  arrived.swap(barrier.arrived);
  join_clocks(arrived);
  shuffle_order(arrived.data(), arrived.size());
  for (Thread* other : arrived) {
    if (other != &thread) push_ready(*other, false);
    if (options.count && other->index % 32 == 0) count_requests(other->index / 32);
  }
}

}  // namespace

void start_collectives() {
  for (Warp& warp : warps)
    for (PendingCollective& pending : warp.collectives) pending.arrived = 0;
  for (NamedBarrier& barrier : named_barriers) barrier.arrived.clear();
}

void meet(Collective what, unsigned mask, const Operand& operand) {
  Thread& thread = *self;
  const int lane = thread.index % 32, number = thread.index / 32;
  thread.site = CALL_SITE;
  thread.waits_at = kCollectiveNames[int(what)];
  if (!(mask >> lane & 1))
    fail("the mask of ", thread.waits_at, " lacks the calling lane", at(thread.site));
  Warp& warp = warps[number];
  PendingCollective& pending = warp.collectives[__builtin_ctz(mask)];
  if (!pending.arrived) {
    pending.what = what;
    pending.mask = mask;
  } else if (pending.what != what || pending.mask != mask) {
    fail("the lanes of a warp meet at different collectives: ", who_waits_where());
  }
  warp.operand[lane] = operand;
  pending.arrived |= 1u << lane;
  if (pending.arrived != mask) return suspend();
  pending.arrived = 0;
  perform(number, what, mask);
  if (options.count && mask == ~0u) count_requests(number);
  // Wake the others in a random order, either before or after the threads that are ready.
  const unsigned turn = random_below(64);
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned other = (i ^ turn) % 32;
    if (int(other) != lane && mask >> other & 1)
      push_ready(threads[number * 32 + other], turn & 32);
  }
}

void named_barrier(int id, int expected) {
  Thread& thread = *self;
  thread.site = CALL_SITE;
  thread.waits_at = id ? "a named barrier" : "__syncthreads";
  if (id < 0 || id > 15 || expected <= 0 || expected > int(blockDim.x) ||
      (expected % 32 && expected != int(blockDim.x)))
    fail("impossible barrier: number ", id, " of ", expected, " threads", at(thread.site));
  arrive_at(named_barriers[id], expected);
}

}  // namespace simt
