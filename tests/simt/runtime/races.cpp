// The race check. Every thread has a vector clock, and every two bytes of the arena remember their
// last accesses. Barriers, mbarriers and waits order accesses, and so do two fences with atomics at
// one address between them; shuffles, mma and atomics alone do not.
#include <sys/mman.h>

#include <algorithm>

#include "internal.h"

namespace simt {

std::string races;
std::set<std::pair<uint32_t, uint32_t>> race_sites;

namespace {

// The last write of two bytes, and the first and the latest read since.
struct Cell {
  Mark write, first_read, latest_read;
};
constexpr size_t kShadowBytes = kArenaBytes / 2 * sizeof(Cell);
Cell* shadow;  // one cell for two bytes of the arena
// By the address of an atomic: the steps before the fences that preceded the atomics there.
std::map<const void*, std::shared_ptr<const BlockClocks>> released;

void add_blocks(std::shared_ptr<const BlockClocks>& into,
                const std::shared_ptr<const BlockClocks>& other) {
  if (!other || into == other) return;
  if (!into) {
    into = other;
    return;
  }
  const auto merged = std::make_shared<BlockClocks>(*into);
  for (const auto& [number, clocks] : *other) {
    std::shared_ptr<const Clocks>& mine = (*merged)[number];
    const auto both = std::make_shared<Clocks>(*clocks);
    if (mine) merge(*both, *mine);
    mine = both;
  }
  into = merged;
}

std::string describe(const Mark& mark) {
  const Site& site = sites[mark.site];
  const int first_copy = blockDim.x, first_warp = actor_of_warp(0);
  return text(block_name(mark.block),
              mark.actor >= first_warp   ? text(" warp ", mark.actor - first_warp)
              : mark.actor >= first_copy ? std::string(" a copy")
                                         : text(" thread ", mark.actor),
              " (", kKindNames[site.kind], at(site.address), ")");
}

void report_race(const Mark& now, const Mark& before, uint64_t offset) {
  if (!race_sites.insert({now.site, before.site}).second) return;
  const Buffer* buffer = buffer_of(offset, 1);
  races += text("race on ", buffer ? buffer->name : "shared memory", " + ",
                buffer ? arena + offset - buffer->begin : offset, ": ", describe(now), " and ",
                describe(before), "\n");
  if (race_sites.size() == kMaxRaces) abandon();
}

// The writer must have fenced after its write, and before the step that ordered it before `thread`.
void check_fence(const Thread& thread, const Mark& write, uint64_t offset, uint32_t site) {
  const Thread& writer = threads[write.actor];
  const auto fence = std::lower_bound(writer.fences.begin(), writer.fences.end(), write.clock);
  const uint32_t until = &writer == &thread ? thread.clock - 1 : (*thread.seen)[write.actor];
  if (fence != writer.fences.end() && *fence <= until) return;
  fail("no fence for wgmma and copies between the write of thread ", write.actor,
       at(sites[write.site].address), " and this ", kKindNames[sites[site].kind],
       at(sites[site].address), " of shared memory + ", offset);
}

}  // namespace

void reserve_shadow() { shadow = reinterpret_cast<Cell*>(reserve(kShadowBytes)); }
void release_shadow() { madvise(shadow, kShadowBytes, MADV_DONTNEED); }
void start_races() {
  race_sites.clear();
  races.clear();
  released.clear();
}

void check_order(const Thread& thread, const Mark& now, uint64_t offset, int bytes, bool keep) {
  const AccessKind kind = sites[now.site].kind;
  // Every block has its own shared memory. Earlier launches come before this one.
  const uint32_t oldest = offset < kSharedRoom ? block : first_block;
  const uint32_t* seen = thread.seen->data();
  const auto before_now = [&](const Mark& mark) {
    if (mark.block < oldest) return true;
    if (mark.block == block) return mark.actor == thread.index || seen[mark.actor] >= mark.clock;
    if (!thread.others) return false;
    const auto other = thread.others->find(mark.block);
    return other != thread.others->end() && (*other->second)[mark.actor] >= mark.clock;
  };
  const auto check = [&](const Mark& mark) {
    if (before_now(mark) || (mark.atomic && now.atomic)) return;
    report_race(now, mark, offset);
  };
  const auto keep_read = [&](Cell& cell) {
    (before_now(cell.first_read) ? cell.first_read : cell.latest_read) = now;
  };
  Cell *const begin = shadow + offset / 2, *const end = shadow + (offset + bytes - 1) / 2 + 1;
  if (kind == kWgmmaRead) {
    for (Cell* cell = begin; cell != end; ++cell) {
      check(cell->write);
      if (cell->write.block == block && sites[cell->write.site].kind != kTensorWrite)
        check_fence(thread, cell->write, offset, now.site);
      if (keep) keep_read(*cell);
    }
    return;
  }
  for (Cell* cell = begin; cell != end; ++cell) {
    check(cell->write);
    if (writes(kind)) {
      check(cell->first_read);
      check(cell->latest_read);
      *cell = {now, {}, {}};
    } else {
      keep_read(*cell);
    }
  }
}

void check_order(const Thread& thread, uint64_t offset, int bytes, uint32_t site) {
  check_order(thread,
              {block, thread.clock, site, uint16_t(thread.index), sites[site].kind == kAtomic},
              offset, bytes);
}

void join_clocks(const std::vector<Thread*>& members) {
  if (!options.check_races) return;
  const Clocks* merged = members[0]->seen.get();
  const auto joined = std::make_shared<Clocks>(*merged);
  for (const Thread* t : members) {
    if (t->seen.get() == merged) continue;  // most members share one
    merged = t->seen.get();
    merge(*joined, *merged);
  }
  for (Thread* t : members) (*joined)[t->index] = t->clock++;
  for (Thread* t : members) t->seen = joined;
  std::shared_ptr<const BlockClocks> others;
  for (Thread* t : members) add_blocks(others, t->others);
  if (others)
    for (Thread* t : members) t->others = others;
}

void merge(Clocks& into, const Clocks& other) {
  if (into.empty()) into.resize(other.size());
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

// The threads of a warp mostly merge the same two clocks, so the last result is kept.
void acquire(Thread& thread, const std::shared_ptr<const Clocks>& clocks) {
  static std::shared_ptr<const Clocks> mine, theirs, both;
  if (!options.check_races) return;
  if (thread.seen != mine || clocks != theirs) {
    mine = thread.seen;
    theirs = clocks;
    const auto merged = std::make_shared<Clocks>(*mine);
    merge(*merged, *theirs);
    both = merged;
  }
  thread.seen = both;
}

void order_atomic(const void* address) {
  add_blocks(self->met, released[address]);
  add_blocks(released[address], self->fenced);
}

void fence_memory() {
  Thread& thread = *self;
  if (!options.check_races) return;
  add_blocks(thread.others, std::exchange(thread.met, {}));
  const auto fenced = thread.others ? std::make_shared<BlockClocks>(*thread.others)
                                    : std::make_shared<BlockClocks>();
  if (const auto own = fenced->find(block); own != fenced->end()) acquire(thread, own->second);
  const auto clocks = std::make_shared<Clocks>(*thread.seen);
  (*clocks)[thread.index] = thread.clock++;
  (*fenced)[block] = clocks;
  thread.fenced = fenced;
}

void fence_proxy() {
  Thread& thread = *self;
  if (options.check_races) thread.fences.push_back(thread.clock++);
}

}  // namespace simt
