// Mbarriers. The 64 bits of an mbarrier in shared memory hold only a number, by which the runtime
// finds its state. The arrivals and the copies of a phase happen before the end of a wait for it.
#include "internal.h"

namespace simt {

std::vector<Mbarrier> mbarriers;

namespace {

constexpr uint64_t kMbarrierMagic = 0x6d62617272696572;

void check_address(const uint64_t* barrier, const void* site) {
  if (!inside_shared(barrier, 8) || reinterpret_cast<uintptr_t>(barrier) % 8)
    fail("the mbarrier is not 8 aligned bytes of shared memory", at(site));
}

}  // namespace

int mbarrier_of(const uint64_t* barrier, const void* site) {
  check_address(barrier, site);
  uint64_t state;
  memcpy(&state, barrier, 8);
  const uint64_t number = state ^ kMbarrierMagic;
  if (number >= mbarriers.size() ||
      mbarriers[number].address != reinterpret_cast<const char*>(barrier))
    fail("no mbarrier was initialised at shared memory + ",
         reinterpret_cast<const char*>(barrier) - shared, ", used", at(site));
  return number;
}

void note_mbarrier(const uint64_t* barrier, AccessKind kind, const void* site) {
  const uint64_t offset = reinterpret_cast<const char*>(barrier) - arena;
  if (offset < watched && options.check_races)
    check_order(*self, offset, 8, site_of(site, kind, true));
}

void end_phase_if_complete(int number) {
  Mbarrier& m = mbarriers[number];
  if (m.missing_arrivals || m.missing_bytes) return;
  ++m.phases;
  m.missing_arrivals = m.arrivals;
  if (options.check_races) {
    m.arrived[actor_of_mbarrier(number)] = m.phases;
    m.released = std::make_shared<const Clocks>(std::exchange(m.arrived, {}));
  }
  shuffle_order(m.waiting.data(), m.waiting.size());
  for (uint16_t thread : m.waiting) push_ready(threads[thread], false);
  m.waiting.clear();
}

void barrier_init(uint64_t* barrier, int arrivals) {
  const void* site = CALL_SITE;
  check_address(barrier, site);
  if (arrivals < 1 || arrivals >= 1 << 20)
    fail("an mbarrier cannot expect ", arrivals, " arrivals", at(site));
  note_mbarrier(barrier, kWrite, site);
  size_t number = 0;
  while (number < mbarriers.size() && mbarriers[number].address != reinterpret_cast<char*>(barrier))
    ++number;
  if (number == kMaxMbarriers) fail("more mbarriers than the emulator holds", at(site));
  Mbarrier fresh{reinterpret_cast<char*>(barrier), arrivals, arrivals};
  if (number == mbarriers.size()) mbarriers.emplace_back();
  // The phases of an earlier mbarrier at this address stay counted, since they number its copies.
  // The count becomes even, because the first parity is 0.
  fresh.phases = (mbarriers[number].phases + 1) / 2 * 2;
  if (options.check_races) fresh.arrived.resize(actors_of_block());
  fresh.released = std::make_shared<const Clocks>(actors_of_block());
  mbarriers[number] = std::move(fresh);
  const uint64_t state = number ^ kMbarrierMagic;
  memcpy(barrier, &state, 8);
}

void barrier_arrive(uint64_t* barrier, int expected_bytes) {
  Thread& thread = *self;
  const void* site = CALL_SITE;
  const int number = mbarrier_of(barrier, site);
  note_mbarrier(barrier, kAtomic, site);
  Mbarrier& m = mbarriers[number];
  if (!m.missing_arrivals)
    fail("more arrivals than the ", m.arrivals, " of the mbarrier at shared memory + ",
         m.address - shared, at(site));
  if (options.check_races) {
    merge(m.arrived, *thread.seen);
    m.arrived[thread.index] = thread.clock++;
  }
  m.missing_bytes += expected_bytes;
  --m.missing_arrivals;
  end_phase_if_complete(number);
}

void barrier_wait(uint64_t* barrier, int parity) {
  Thread& thread = *self;
  const void* site = CALL_SITE;
  const int number = mbarrier_of(barrier, site);
  note_mbarrier(barrier, kAtomic, site);
  if (parity != 0 && parity != 1) fail("a parity must be 0 or 1, got ", parity, at(site));
  const uint32_t phase = mbarriers[number].phases;
  while (int(mbarriers[number].phases & 1) == parity) {
    thread.site = site;
    thread.waits_at = "barrier_wait";
    thread.waited_mbarrier = number;
    thread.waited_parity = parity;
    mbarriers[number].waiting.push_back(thread.index);
    suspend();
    thread.waited_mbarrier = -1;
    if (mbarriers[number].phases > phase + 1)
      fail("the next phase has ended, too, before a thread has seen the end of its phase",
           at(site));
  }
  acquire(thread, mbarriers[number].released);
}

}  // namespace simt
