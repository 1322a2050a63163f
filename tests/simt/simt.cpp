// The emulator's runtime: fibres, barriers and warp collectives; memory with its race check;
// counters. GCC's -fsanitize=thread calls the hooks at the end for each access of a kernel to
// memory; this file is compiled without. An error leaves the fibre for good and is thrown out of
// run().
#include "simt.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <sstream>
#include <stdexcept>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

// The return address is behind the call.
#define CALL_SITE (static_cast<const char*>(__builtin_return_address(0)) - 1)

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kAsan = true;
#else
constexpr bool kAsan = false;
#endif
constexpr int kMaxBlockThreads = 1024, kMaxShared = 227 * 1024, kMaxRaces = 5;
constexpr int kMaxPhasers = 128;  // of a block
constexpr size_t kStackBytes = kAsan ? 512 << 10 : 128 << 10, kPage = 4096;
// The instrumented build's memory: shared memory, then the global buffers. Pages cost nothing until
// touched, so room for a large array and for the marks on it is only reserved.
constexpr size_t kSharedRoom = 256 << 10;
constexpr size_t kArenaBytes = size_t(32) << 30, kSector = 32, kGap = 256;
constexpr uint32_t kSharedBase = 1024;  // what a kernel sees as its shared memory's address

char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("simt: no address space");
  return static_cast<char*>(memory);
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Where a piece of code is, from its debug information: the line of the innermost inlined frame
// that is no mere wrapper, and the outermost function.

struct Place {
  std::string function, line;
};
std::map<const void*, Place> places;

// One run of addr2line for all: starting it costs more than an address does.
void find_places(const std::set<const void*>& addresses) {
  std::vector<const void*> asked;
  std::string list;
  Dl_info module{};
  for (const void* address : addresses) {
    if (places.count(address) || !dladdr(address, &module)) continue;
    const void* offset = reinterpret_cast<void*>((char*)address - (char*)module.dli_fbase);
    places[address].line = text(offset);
    list += " " + text(offset);
    asked.push_back(address);
  }
  if (asked.empty()) return;
  FILE* pipe = popen(text("addr2line -aifCe '", module.dli_fname, "'", list).c_str(), "r");
  char function[4096], line[4096];
  size_t count = 0;
  bool settled = false;
  while (fgets(function, sizeof function, pipe)) {
    if (!strncmp(function, "0x", 2)) {
      ++count;
      settled = false;
    } else if (fgets(line, sizeof line, pipe) && count && line[0] != '?') {
      Place& place = places[asked[count - 1]];
      if (char* end = strrchr(function, ')')) {
        // Without the parameters, whose types may have parentheses, too.
        for (int depth = 0; end > function; --end)
          if (depth += (*end == ')') - (*end == '('), depth == 0) break;
        *end = 0;
      }
      place.function = function + (strncmp(function, "void ", 5) ? 0 : 5);
      const char* name = strrchr(line, '/') ? strrchr(line, '/') + 1 : line;
      if (!settled) place.line.assign(name, strcspn(name, " \n"));
      settled |= strncmp(name, "ptx", 3) && strncmp(name, "simt.h", 6);
    }
  }
  pclose(pipe);
}
const Place& place_of(const void* address) {
  find_places({address});
  return places[address];
}

struct Fibre {
  char* stack = nullptr;
  const void* bottom = nullptr;  // as AddressSanitizer is told
  size_t bytes = 0;
#ifdef __x86_64__
  void* top = nullptr;
#else
  ucontext_t context;
#endif
};

#ifdef __x86_64__
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.local simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

void prepare(Fibre& fibre, int index, void (*entry)()) {
  if (!fibre.stack) {
    fibre.stack = reserve(kStackBytes + kPage);
    mprotect(fibre.stack, kPage, PROT_NONE);
    fibre.bottom = fibre.stack + kPage;
    fibre.bytes = kStackBytes;
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fibre.bottom, fibre.bytes);
#endif
  // The stacks start at different places of a page, or all would share a few lines of the cache.
  const size_t bytes = kStackBytes - index * 832 % kPage / 64 * 64;
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(fibre.stack + kPage + bytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  fibre.top = top - 6;
  std::fill_n(top - 6, 6, nullptr);
#else
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack + kPage;
  fibre.context.uc_stack.ss_size = bytes;
  makecontext(&fibre.context, entry, 0);
#endif
}

using Clocks = std::vector<uint32_t>;

struct Copy {
  char* smem;
  const char* global;
  int bytes, group;
  const void* site;
};

// An mbarrier: it has 64 bits in shared memory, which hold only a number to find it by. What a
// thread released before it arrived, and the copies of the phase, are seen by those that waited.
struct Phaser {
  char* address;
  int count, pending;
  int64_t bytes = 0;  // to come
  uint32_t phase = 0;
  Clocks arrived = {};  // of this phase
  std::shared_ptr<const Clocks> ended = {};
  std::vector<uint16_t> waiting = {};
};

// A tensor copy on its way.
struct TensorCopy {
  MatrixMap map;
  int thread, col, row, phaser;
  uint32_t phase;
  char* smem;
  const void* site;
};

struct Thread {
  Fibre fibre;
  int index;
  std::shared_ptr<const Clocks> seen;  // of every thread, what a barrier has put before us
  uint32_t clock = 1;                  // counts the thread's barriers
  std::vector<Copy> copies = {};       // not yet waited for
  int committed = 0;
  std::vector<uint32_t> fences = {};  // clocks at which it fenced its writes for wgmma and copies
  const char* waits_at = nullptr;     // a barrier or collective, at this site
  int waits_for = -1, parity = 0;     // a phaser
  const void* site = nullptr;
  bool done = false;
};

// One instruction of a warp as far as its lanes have run it: the n-th run of a site since the warp
// last met.
struct Group {
  uint32_t site;
  int previous;  // the same site's (n-1)-th
  unsigned lanes;
  uint8_t bytes[32];
  uint64_t offset[32];
};

struct Meeting {
  Collective what;
  unsigned mask, arrived = 0;
};

// A wgmma that is not finished, and the accumulators of one or several of them. Operands are read
// as late as they may be; until then the lanes' accumulators are NaN.
struct Sums {
  float* lane[32];
  int cols, pending = 0;
  float sum[16][256];
};
struct Product {
  Wgmma what;
  const uint32_t* a[32];
  std::shared_ptr<Sums> sums;
  int group;
  const void* site;
};

struct Warp {
  std::vector<Product> products = {};
  int committed = 0, issued = 0;
  bool fenced = false;
  uint32_t clock = 0;    // counts its waits for wgmma
  Meeting meetings[32];  // by the lowest lane of the mask
  Operand operand[32];
  std::vector<Group> groups;
  std::vector<int> last;  // by site: its last group or -1
  int cursor[32];         // by lane: the group it joined last
};

struct Barrier {
  int wanted;
  std::vector<Thread*> arrived;
};

enum Kind : uint8_t {
  kRead,
  kWrite,
  kMatrixRead,
  kAsyncRead,
  kWgmmaRead,
  kTensorRead,
  kAsyncWrite,
  kArrival,
  kAtomic,
  kTensorWrite
};
const char* const kKindNames[] = {"read",       "write",       "ldmatrix",       "cp.async read",
                                  "wgmma read", "tensor read", "cp.async write", "cp.async arrival",
                                  "atomic",     "tensor copy"};
bool writes(Kind kind) { return kind == kWrite || kind >= kAsyncWrite; }

struct Site {
  const void* address;
  Kind kind;
  bool shared;
};
struct Record {
  const void* kernel;
  LaunchReport report;
  std::vector<uint32_t> sites;  // of the report's
};
struct Buffer {
  std::string name;
  char* begin;
  size_t bytes;
};

// Who touched two bytes: the last write, and the first and latest read since.
struct Mark {
  uint32_t block = 0, clock = 0, site = 0;
  uint16_t thread = 0;
  bool atomic = false;
};
struct Cell {
  Mark write, first, latest;
};

constexpr size_t kCellsBytes = kArenaBytes / 2 * sizeof(Cell), kStampsBytes = kArenaBytes / 8;

Options options;
std::vector<Buffer> buffers;
std::vector<Record> records;

char *arena, *shared;
[[maybe_unused]] size_t arena_used = kSharedRoom;
size_t shared_bytes;
size_t watched;                  // bytes of the arena that the hooks look at: 0 outside a launch
Cell* cells;                     // one for two bytes of the arena
uint32_t *read_in, *written_in;  // by sector: the last launch that did
uint32_t launches;

std::vector<Site> sites;
std::vector<uint32_t> site_slots(1 << 16);  // hash table: 1 + index into sites
std::vector<SiteReport> counters;           // of this launch

std::array<Thread, kMaxBlockThreads> threads;
std::array<Warp, kMaxBlockThreads / 32> warps;
std::array<Barrier, 16> barriers;
std::array<uint16_t, kMaxBlockThreads> ready;  // a ring
unsigned ready_head, ready_count;
Fibre main_fibre;
Thread* self;
int alive;
std::vector<Phaser> phasers;
std::vector<TensorCopy> tensor_copies;
// By warpgroup: what its warps' wgmma must be in turn.
std::vector<std::vector<Wgmma>> warpgroups;
const std::function<void()>* body;
Record* record;
std::vector<uint32_t> order;      // of the blocks
uint32_t block, first_block = 1;  // numbered through all launches; 0 is never
std::set<std::pair<uint32_t, uint32_t>> race_sites;
std::string races, error;
uint64_t random_state;

uint32_t random_below(uint32_t n) {
  random_state += 0x9e3779b97f4a7c15;
  uint64_t z = random_state;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return uint64_t(uint32_t(z ^ z >> 31)) * n >> 32;
}
template <class T>
void shuffle_order(T* begin, size_t n) {
  for (size_t i = n; i > 1; --i) std::swap(begin[i - 1], begin[random_below(i)]);
}

void switch_to(Fibre& from, Fibre& to, [[maybe_unused]] bool last = false) {
#ifdef __SANITIZE_ADDRESS__
  void* fake;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, to.bottom, to.bytes);
#endif
#ifdef __x86_64__
  simt_switch(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void push_ready(const Thread& thread, bool front) {
  const unsigned at = front ? --ready_head : ready_head + ready_count;
  ready[at % kMaxBlockThreads] = thread.index;
  ++ready_count;
}

void run_next(Fibre& from, bool last = false) {
  self = &threads[ready[ready_head++ % kMaxBlockThreads]];
  --ready_count;
  threadIdx.x = self->index;
  // A copy that has just come can have made the leaving thread the next one.
  if (&from != &self->fibre) switch_to(from, self->fibre, last);
}

void deliver_some();

// Runs whoever is ready; back here once somebody has made this thread ready again.
void leave(bool last = false) {
  if (!tensor_copies.empty()) deliver_some();
  Fibre& mine = self->fibre;
  if (ready_count)
    run_next(mine, last);
  else
    switch_to(mine, main_fibre, last);
  self->waits_at = nullptr;
}

void end_block();

void enter() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!main_fibre.bottom) main_fibre.bottom = bottom, main_fibre.bytes = bytes;
#endif
  (*body)();
  self->done = true;
  if (!--alive) end_block();
  leave(true);
}

dim3 block_at(uint32_t number) {
  const unsigned i = order[number - first_block], x = gridDim.x, y = gridDim.y;
  return {i % x, i / x % y, i / x / y};
}
std::string block_name(uint32_t number) {
  const dim3 at = block_at(number);
  return text("block (", at.x, ", ", at.y, ", ", at.z, ")");
}

// Leaves the launch; the fibres are never resumed.
template <class... Parts>
[[noreturn]] void fail(const Parts&... what) {
  error = text(block_name(block), " thread ", self->index, ": ", what...);
  switch_to(self->fibre, main_fibre);
  __builtin_unreachable();
}
std::string at(const void* site) { return " at " + place_of(site).line; }

// "threads 0-15: __syncthreads at forward.cu:33; threads 16-31: exited"
std::string who_waits_where() {
  std::map<std::string, std::vector<int>> groups;
  for (unsigned i = 0; i < blockDim.x; ++i) {
    const Thread& t = threads[i];
    std::string where = t.waits_at ? t.waits_at + at(t.site) : t.done ? "exited" : "run";
    if (t.waits_at && t.waits_for >= 0) {
      const Phaser& p = phasers[t.waits_for];
      where += text(" for parity ", t.parity, " of shared memory + ", p.address - shared, " (",
                    p.phase, " phases ended, ", p.pending, " of ", p.count, " arrivals and ",
                    p.bytes, " bytes missing)");
    }
    groups[where].push_back(i);
  }
  std::string list;
  for (const auto& [where, members] : groups) {
    list += list.empty() ? "threads" : "; threads";
    for (size_t i = 0, j; i < members.size(); i = j) {
      for (j = i + 1; j < members.size() && members[j] == members[j - 1] + 1;) ++j;
      list += text(i ? ", " : " ", members[i]);
      if (j > i + 1) list += text("-", members[j - 1]);
    }
    list += ": " + where;
  }
  return list;
}

// The number of a place in the code that does one kind of access.
uint32_t site_of(const void* address, Kind kind, bool is_shared) {
  const uint64_t key = reinterpret_cast<uint64_t>(address) << 4 | kind << 1 | is_shared;
  for (uint64_t slot = key * 0x9e3779b97f4a7c15 >> 48;; ++slot) {
    uint32_t& index = site_slots[slot % site_slots.size()];
    if (!index) {
      if (sites.size() > site_slots.size() / 2) fail("more call sites than the emulator holds");
      sites.push_back({address, kind, is_shared});
      counters.emplace_back();
      index = sites.size();
    }
    const Site& site = sites[index - 1];
    if (site.address == address && site.kind == kind && site.shared == is_shared) return index - 1;
  }
}

// Adds an access to the instruction of its warp. A lane's n-th run of a site belongs to the site's
// n-th group, whichever lane comes first.
void join_group(int thread, uint32_t site, uint64_t offset, int bytes) {
  Warp& warp = warps[thread / 32];
  std::vector<Group>& groups = warp.groups;
  const int lane = thread % 32;
  const auto has = [&](int group) { return groups[group].lanes >> lane & 1; };
  const auto is_next = [&](int group) {
    const Group& g = groups[group];
    return g.site == site && !has(group) && (g.previous < 0 || has(g.previous));
  };
  int group = warp.cursor[lane] + 1;  // most often right
  if (group >= int(groups.size()) || !is_next(group)) {
    if (warp.last.size() <= site) warp.last.resize(site + 64, -1);
    int& last = warp.last[site];
    if (last < 0 || has(last)) {
      groups.push_back({site, last, 0, {}, {}});
      last = groups.size() - 1;
    }
    for (group = last; !is_next(group);) group = groups[group].previous;
  }
  warp.cursor[lane] = group;
  groups[group].lanes |= 1u << lane;
  groups[group].bytes[lane] = bytes;
  groups[group].offset[lane] = offset;
}

// Shared memory serves at most 128 bytes at a time: one word from each of 32 banks.
void count_wavefronts(const Group& group, SiteReport& counter) {
  const int widest = *std::max_element(group.bytes, group.bytes + 32);
  const int lanes = widest <= 4 ? 32 : widest <= 8 ? 16 : 8;
  for (int first = 0; first < 32; first += lanes) {
    uint32_t words[32][32];
    uint8_t count[32] = {};
    unsigned worst = 0;
    for (int lane = first; lane < first + lanes; ++lane) {
      if (!(group.lanes >> lane & 1)) continue;
      const uint64_t begin = group.offset[lane], last = begin + group.bytes[lane] - 1;
      for (uint32_t word = begin / 4; word <= last / 4; ++word) {
        uint32_t* const bank = words[word % 32];
        uint8_t& n = count[word % 32];
        if (std::find(bank, bank + n, word) == bank + n) bank[n++] = word;
        worst = std::max<unsigned>(worst, n);
      }
    }
    counter.wavefronts += worst;
    counter.conflicts += worst ? worst - 1 : 0;
  }
}

void count_sectors(const Group& group, bool write, SiteReport& counter) {
  LaunchReport& report = record->report;
  uint64_t& unique = write ? report.global_unique_write_sectors : report.global_unique_read_sectors;
  uint64_t sectors[64];
  int count = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(group.lanes >> lane & 1)) continue;
    const uint64_t begin = group.offset[lane], last = begin + group.bytes[lane] - 1;
    for (uint64_t sector = begin / kSector; sector <= last / kSector; ++sector) {
      if (std::find(sectors, sectors + count, sector) != sectors + count) continue;
      sectors[count++] = sector;
      uint32_t& stamp = (write ? written_in : read_in)[sector];
      unique += std::exchange(stamp, launches) != launches;
    }
  }
  counter.sectors += count;
}

void flush(Warp& warp) {
  for (const Group& group : warp.groups) {
    const Site& site = sites[group.site];
    SiteReport& counter = counters[group.site];
    ++counter.requests;
    for (int bytes : group.bytes) counter.bytes += bytes;
    if (site.shared) count_wavefronts(group, counter);
    if (!site.shared) count_sectors(group, writes(site.kind), counter);
    warp.last[group.site] = -1;
  }
  warp.groups.clear();
  std::fill_n(warp.cursor, 32, -1);
}

// The race check: vector clocks. Barriers order threads; shuffles, mma and atomics do not.

void join_clocks(const std::vector<Thread*>& members) {
  if (!options.check_races) return;
  const Clocks* merged = members[0]->seen.get();
  const auto joined = std::make_shared<Clocks>(*merged);
  for (const Thread* t : members) {
    if (t->seen.get() == merged) continue;  // most share one
    merged = t->seen.get();
    for (size_t i = 0; i < joined->size(); ++i) (*joined)[i] = std::max((*joined)[i], (*merged)[i]);
  }
  for (Thread* t : members) (*joined)[t->index] = t->clock++;
  for (Thread* t : members) t->seen = joined;
}

const Buffer* buffer_of(uint64_t offset, int bytes) {
  const char* begin = arena + offset;
  auto b = std::upper_bound(buffers.begin(), buffers.end(), begin,
                            [](const char* a, const Buffer& buffer) { return a < buffer.begin; });
  return b != buffers.begin() && begin + bytes <= (--b)->begin + b->bytes ? &*b : nullptr;
}

void report_race(const Mark& now, const Mark& before, uint64_t offset) {
  if (!race_sites.insert({now.site, before.site}).second) return;
  const auto describe = [](const Mark& mark) {
    const Site& site = sites[mark.site];
    const int total = blockDim.x, warp = mark.thread - total - kMaxPhasers;
    return text(block_name(mark.block),
                warp >= 0              ? text(" warp ", warp)
                : mark.thread >= total ? std::string(" a copy")
                                       : text(" thread ", mark.thread),
                " (", kKindNames[site.kind], at(site.address), ")");
  };
  const Buffer* buffer = buffer_of(offset, 1);
  races += text("race on ", buffer ? buffer->name : "shared memory", " + ",
                buffer ? arena + offset - buffer->begin : offset, ": ", describe(now), " and ",
                describe(before), "\n");
  if (race_sites.size() == kMaxRaces) switch_to(self->fibre, main_fibre);
}

// The writer must have fenced between its write and what made it seen.
void check_fence(const Thread& thread, const Mark& mark, uint64_t offset, uint32_t site) {
  const Thread& writer = threads[mark.thread];
  const auto fence = std::lower_bound(writer.fences.begin(), writer.fences.end(), mark.clock);
  const uint32_t until = &writer == &thread ? thread.clock - 1 : (*thread.seen)[mark.thread];
  if (fence != writer.fences.end() && *fence <= until) return;
  fail("no fence for wgmma and copies between the write of thread ", mark.thread,
       at(sites[mark.site].address), " and this ", kKindNames[sites[site].kind],
       at(sites[site].address), " of shared memory + ", offset);
}

// The same as `thread` does at `now`, which may be what it has started.
void check_order(const Thread& thread, const Mark& now, uint64_t offset, int bytes,
                 bool keep = true) {
  const Kind kind = sites[now.site].kind;
  // Shared memory is a new one for every block; earlier launches come before this one.
  const uint32_t oldest = offset < kSharedRoom ? block : first_block;
  const uint32_t* seen = thread.seen->data();
  const auto before_now = [&](const Mark& mark) {
    return mark.block < oldest || (mark.block == block && (mark.thread == thread.index ||
                                                           seen[mark.thread] >= mark.clock));
  };
  const auto clash = [&](const Mark& mark) {
    if (before_now(mark) || (mark.atomic && now.atomic)) return;
    report_race(now, mark, offset);
  };
  if (kind == kWgmmaRead) {
    for (Cell* cell = cells + offset / 2; cell <= cells + (offset + bytes - 1) / 2; ++cell) {
      clash(cell->write);
      if (cell->write.block == block && sites[cell->write.site].kind != kTensorWrite)
        check_fence(thread, cell->write, offset, now.site);
      if (keep) (before_now(cell->first) ? cell->first : cell->latest) = now;
    }
    return;
  }
  for (Cell* cell = cells + offset / 2; cell <= cells + (offset + bytes - 1) / 2; ++cell) {
    clash(cell->write);
    if (writes(kind)) {
      clash(cell->first);
      clash(cell->latest);
      *cell = {now, {}, {}};
    } else {
      (before_now(cell->first) ? cell->first : cell->latest) = now;
    }
  }
}

void check_order(const Thread& thread, uint64_t offset, int bytes, uint32_t site) {
  check_order(thread,
              {block, thread.clock, site, uint16_t(thread.index), sites[site].kind == kAtomic},
              offset, bytes);
}

// Every access of a kernel to shared or global memory comes by here in the instrumented build.
void note(const Thread& thread, const void* address, int bytes, Kind kind, const void* site) {
  const uint64_t offset = static_cast<const char*>(address) - arena;
  if (offset >= watched) return;
  const bool is_shared = offset < kSharedRoom;
  if (is_shared ? offset + bytes > shared_bytes : !buffer_of(offset, bytes))
    fail(kKindNames[kind], at(site), " outside ",
         is_shared ? text("shared memory of ", shared_bytes, " bytes") : "every buffer");
  const uint32_t index = site_of(site, kind, is_shared);
  if (options.check_races) check_order(thread, offset, bytes, index);
  if (options.count && kind < kArrival) join_group(thread.index, index, offset, bytes);
}

// Of what is written as one access; what the compiler knows to be less aligned, nvcc takes apart.
void check_alignment(const void* address, int bytes, Kind kind, const void* site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  const int64_t offset = static_cast<const char*>(address) - arena;
  const Buffer* buffer = buffer_of(offset, 1);
  fail("misaligned address: ", kKindNames[kind], at(site), " of ", bytes, " bytes at ",
       buffer ? buffer->name : "shared memory", " + ",
       buffer ? static_cast<const char*>(address) - buffer->begin : offset);
}

// The low bits that a tf32 operand has no room for are ignored, as the hardware does.
float from_tf32(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }
float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
float from_f16(uint16_t bits) {
  const float magnitude = std::bit_cast<float>(uint32_t(bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special |
                              uint32_t(bits & 0x8000) << 16);
}

// D += A B with A [16, depth] and B [depth, 8], a register holding one or two neighbours in k.
// The lanes' registers are not the sanitizers' business, and this is where the time goes.
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

// Mbarriers and tensor copies.

bool inside(const void* smem, size_t bytes) {
  const size_t offset = static_cast<const char*>(smem) - shared;
  return offset < shared_bytes && bytes <= shared_bytes - offset;
}
// What a warp or the copy engine does, in the number of clocks behind those of threads.
uint16_t clock_of_phaser(int phaser) { return blockDim.x + phaser; }
uint16_t clock_of_warp(int warp) { return blockDim.x + kMaxPhasers + warp; }

void merge(Clocks& into, const Clocks& other) {
  if (into.empty()) into.resize(other.size());
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}
// The thread has seen `clocks` too. Most threads of a warp have seen the same before.
void see(Thread& thread, const std::shared_ptr<const Clocks>& clocks) {
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

constexpr uint64_t kPhaserMagic = 0x6d62617272696572, kMapMagic = 0x74656e736f724d61;

int phaser_of(const uint64_t* barrier, const void* site) {
  if (!inside(barrier, 8) || reinterpret_cast<uintptr_t>(barrier) % 8)
    fail("an mbarrier that is not 8 bytes of shared memory", at(site));
  uint64_t state;
  memcpy(&state, barrier, 8);
  const uint64_t number = state ^ kPhaserMagic;
  if (number >= phasers.size() || phasers[number].address != reinterpret_cast<const char*>(barrier))
    fail("no mbarrier was initialised at shared memory + ",
         reinterpret_cast<const char*>(barrier) - shared, ", used", at(site));
  return number;
}
void note_barrier(const uint64_t* barrier, Kind kind, const void* site) {
  const uint64_t offset = reinterpret_cast<const char*>(barrier) - arena;
  if (offset < watched && options.check_races)
    check_order(*self, offset, 8, site_of(site, kind, true));
}

void end_phase_if_complete(int number) {
  Phaser& p = phasers[number];
  if (p.pending || p.bytes) return;
  ++p.phase;
  p.pending = p.count;
  if (options.check_races) {
    p.arrived[clock_of_phaser(number)] = p.phase;
    p.ended = std::make_shared<const Clocks>(std::exchange(p.arrived, {}));
  }
  shuffle_order(p.waiting.data(), p.waiting.size());
  for (uint16_t thread : p.waiting) push_ready(threads[thread], false);
  p.waiting.clear();
}

void count_copy(uint32_t site, const char* from, int64_t bytes) {
  SiteReport& counter = counters[site];
  const uint64_t begin = (from - arena) / kSector, end = (from + bytes - 1 - arena) / kSector + 1;
  counter.bytes += bytes;
  counter.sectors += end - begin;
  for (uint64_t sector = begin; sector < end; ++sector)
    record->report.global_unique_read_sectors +=
        std::exchange(read_in[sector], launches) != launches;
}

// Calls f(line of the box, byte in the line, place in memory, bytes) for what is in the matrix.
template <class F>
void for_lines(const TensorCopy& copy, const F& f) {
  const MatrixMap& m = copy.map;
  const int64_t first = int64_t(copy.col) * m.element_bytes;
  const int64_t begin = std::max<int64_t>(first, 0);
  const int64_t end = std::min<int64_t>(first + 128, m.cols * m.element_bytes);
  if (begin >= end) return;
  for (int line = 0; line < m.box_rows; ++line) {
    const int64_t row = int64_t(copy.row) + line;
    if (row >= 0 && row < m.rows)
      f(line, int(begin - first), m.data + row * m.row_bytes + begin, end - begin);
  }
}

void deliver(const TensorCopy& copy) {
  Phaser& p = phasers[copy.phaser];
  self = &threads[copy.thread];
  if (p.phase != copy.phase)
    fail(
        "the phase ended before its copy came: more bytes are copied than expected by the mbarrier",
        at(copy.site));
  memset(copy.smem, 0, size_t(copy.map.box_rows) * 128);
  for_lines(copy, [&](int line, int byte, const char* from, int64_t bytes) {
    char whole[128] = {};
    memcpy(whole + byte, from, bytes);
    for (int chunk = 0; chunk < 8; ++chunk)
      memcpy(copy.smem + line * 128 + (chunk ^ (line & 7)) * 16, whole + chunk * 16, 16);
  });
  p.bytes -= int64_t(copy.map.box_rows) * 128;
  end_phase_if_complete(copy.phaser);
}

// Copies arrive in any order, now or later, at the latest when there is nothing else to do.
void deliver_some() {
  Thread* const me = self;
  while (!tensor_copies.empty() && (!ready_count || random_below(4) == 0)) {
    std::swap(tensor_copies[random_below(tensor_copies.size())], tensor_copies.back());
    const TensorCopy copy = tensor_copies.back();
    tensor_copies.pop_back();
    deliver(copy);
  }
  self = me;
}

// The block's last thread has exited.
void end_block() {
  if (!tensor_copies.empty())
    fail("the block exits before its copy has arrived, started", at(tensor_copies[0].site));
  for (int warp = 0; warp < int(blockDim.x / 32); ++warp) {
    const std::vector<Product>& products = warps[warp].products;
    if (!products.empty())
      fail("warp ", warp, " exits without waiting for its wgmma", at(products[0].site));
    if (warps[warp].issued != warps[warp / 4 * 4].issued)
      fail("warps ", warp / 4 * 4, " and ", warp,
           " of a warpgroup have issued different numbers of wgmma");
  }
}

// wgmma.

using WideRow = float __attribute__((vector_size(32)));

// sum += A B, or = A B, of 16 rows, 16 deep; no multiply-add is fused.
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

// Calls f(mn or k, chunk along the other, address of 16 bytes) for the 16-byte chunks of an operand
// of `extent` lines, 16 deep. Lines lie along k, or transposed along mn.
template <class F>
__attribute__((always_inline)) inline void for_chunks(uint64_t descriptor, bool transposed,
                                                      int extent, char* base, const F& f) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  const auto place = [&](uint32_t address) {
    return base + (int64_t(address ^ (address >> 7 & 7) << 4) - kSharedBase);
  };
  if (!transposed) {
    for (int mn = 0; mn < extent; ++mn)
      for (int c = 0; c < 2; ++c) f(mn, c, place(start + mn / 8 * stride + mn % 8 * 128 + c * 16));
  } else {
    for (int k = 0; k < 16; ++k)
      for (int c = 0; c < extent / 8; ++c)
        f(k, c, place(start + c / 8 * leading + k / 8 * stride + k % 8 * 128 + c % 8 * 16));
  }
}

// The rows of A that the warp has.
uint64_t descriptor_of_a(const Wgmma& w, int warp) {
  const int first = warp % 4 * 16;
  const uint64_t stride = w.a_descriptor >> 32 & 0x3fff;
  return w.a_descriptor + (w.transposed_a ? first * 2 / 16 : first / 8 * stride);
}

// Is what wgmma reads there, and not being written? Adjacent chunks go together.
void check_operand(int warp, uint64_t descriptor, bool transposed, int extent, bool finished,
                   const void* site) {
  const Thread& thread = threads[warp * 32];
  char* const base = shared;
  if (descriptor >> 62 != 1) fail("a wgmma descriptor without the 128-byte swizzle", at(site));
  const bool watching = watched && options.check_races;
  const Mark now{block, warps[warp].clock + 1, watching ? site_of(site, kWgmmaRead, true) : 0,
                 clock_of_warp(warp), false};
  uint64_t from = 0, to = 0;
  const auto check = [&] {
    if (to > from) check_order(thread, now, from, to - from, finished);
  };
  for_chunks(descriptor, transposed, extent, base, [&](int, int, const char* chunk) {
    if (!inside(chunk, 16))
      fail("wgmma reads shared memory + ", chunk - base, " of ", shared_bytes, " bytes", at(site));
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

// An operand as floats [16][extent], k first, and its bytes: most often another warp has just read
// the same.
struct Converted {
  uint64_t descriptor;
  int extent;
  bool transposed;
  MmaKind kind;
  uint16_t raw[16 * 256];
  float value[16][256];
};

const Converted& convert(uint64_t descriptor, bool transposed, int extent, MmaKind kind,
                         char* base) {
  static std::vector<Converted> cache(64);
  static uint16_t raw[16 * 256];
  for_chunks(descriptor, transposed, extent, base, [&](int line, int chunk, const char* from) {
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

// A lane's accumulators 4 j ... are row lane / 4 (and + 8), columns 8 j + lane % 4 * 2 (and + 1).
__attribute__((no_sanitize("address", "undefined"))) void move_sums(Sums& sums, bool to_lanes) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < sums.cols / 2; i += 2) {
      float* const here = &sums.sum[lane / 4 + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2];
      float* const there = sums.lane[lane] + i;
      __builtin_memcpy(to_lanes ? there : here, to_lanes ? here : there, 8);
    }
}
__attribute__((no_sanitize("address", "undefined"))) void poison(const Sums& sums) {
  for (float* lane : sums.lane)
    for (int i = 0; i < sums.cols / 2; ++i) lane[i] = __builtin_nanf("");
}
__attribute__((no_sanitize("address", "undefined"))) void load_a(const Product& product,
                                                                 float (*a)[16]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e) {
        const uint16_t bits = product.a[lane][i] >> 16 * e;
        a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + e] =
            product.what.kind == kBf16 ? from_bf16(bits) : from_f16(bits);
      }
}

void issue_wgmma(int number, const Operand* operand) {
  Warp& warp = warps[number];
  const void* site = self->site;
  if ((number / 4 + 1) * 128 > int(blockDim.x))
    fail("wgmma of a warpgroup that is not whole", at(site));
  Product product{*static_cast<const Wgmma*>(operand[0].in), {}, nullptr, warp.committed, site};
  const Wgmma& w = product.what;
  const auto same = [](const Wgmma& a, const Wgmma& b) {
    return a.kind == b.kind && a.cols == b.cols && a.a_descriptor == b.a_descriptor &&
           a.b_descriptor == b.b_descriptor && a.transposed_a == b.transposed_a &&
           a.transposed_b == b.transposed_b && a.add == b.add && !a.a == !b.a;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const Wgmma& other = *static_cast<const Wgmma*>(operand[lane].in);
    if (!same(w, other)) fail("the lanes of a warp give wgmma different operands", at(site));
    product.a[lane] = other.a;
  }
  std::vector<Wgmma>& issued = warpgroups[number / 4];
  if (warp.issued == int(issued.size())) issued.push_back(w);
  if (!same(issued[warp.issued++], w))
    fail("the warps of a warpgroup give wgmma different operands", at(site));
  for (const Product& other : warp.products)
    if (other.sums->lane[0] == operand[0].out) product.sums = other.sums;
  if (!warp.fenced && (w.a || !product.sums))
    fail("wgmma whose registers may have changed since wgmma_fence", at(site));
  if (!product.sums) {
    product.sums = std::make_shared<Sums>();
    product.sums->cols = w.cols;
    for (int lane = 0; lane < 32; ++lane)
      product.sums->lane[lane] = static_cast<float*>(operand[lane].out);
    if (w.add) move_sums(*product.sums, false);
    poison(*product.sums);
  }
  for (int lane = 0; lane < 32; ++lane)
    if (product.sums->lane[lane] != operand[lane].out || product.sums->cols != w.cols)
      fail("wgmma that are under way share some of their accumulators", at(site));
  ++product.sums->pending;
  if (!w.a) check_operand(number, descriptor_of_a(w, number), w.transposed_a, 16, false, site);
  check_operand(number, w.b_descriptor, w.transposed_b, w.cols, false, site);
  record->report.wgmma += number % 4 == 0;
  warp.products.push_back(product);
}

void finish_wgmma(int number, const Product& product) {
  const Wgmma& w = product.what;
  char* const base = shared;
  float a[16][16];
  if (w.a) {
    load_a(product, a);
  } else {
    const uint64_t descriptor = descriptor_of_a(w, number);
    check_operand(number, descriptor, w.transposed_a, 16, true, product.site);
    const Converted& from = convert(descriptor, w.transposed_a, 16, w.kind, base);
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k) a[i][k] = from.value[k][i];
  }
  check_operand(number, w.b_descriptor, w.transposed_b, w.cols, true, product.site);
  const Converted& b = convert(w.b_descriptor, w.transposed_b, w.cols, w.kind, base);
  multiply_rows_best(product.sums->sum, a, b.value, w.cols, w.add);
  if (--product.sums->pending == 0) move_sums(*product.sums, true);
}

void wait_wgmma(int number, int pending) {
  Warp& warp = warps[number];
  auto product = warp.products.begin();
  for (; product != warp.products.end() && product->group < warp.committed - pending; ++product)
    finish_wgmma(number, *product);
  if (product == warp.products.begin()) return;
  warp.products.erase(warp.products.begin(), product);
  warp.fenced = false;
  if (!options.check_races) return;
  Clocks finished(threads[0].seen->size());
  finished[clock_of_warp(number)] = ++warp.clock;
  const auto clocks = std::make_shared<const Clocks>(std::move(finished));
  for (int lane = 0; lane < 32; ++lane) see(threads[number * 32 + lane], clocks);
}

void perform(int warp, const Meeting& meeting) {
  const Operand* operand = warps[warp].operand;
  int all[32], count = 0;
  for (unsigned left = meeting.mask; left; left &= left - 1) all[count++] = __builtin_ctz(left);
  const std::span<const int> lanes(all, count);
  if (meeting.what == Collective::kSyncWarp) {
    std::vector<Thread*> members;
    for (int lane : lanes) members.push_back(&threads[warp * 32 + lane]);
    join_clocks(members);
  } else if (meeting.what == Collective::kShuffle) {
    for (int lane : lanes) {
      const Operand& to = operand[lane];
      if (!(meeting.mask >> to.argument & 1))
        fail("lane ", lane, " wants the value of lane ", to.argument, ", which is not in the mask",
             at(self->site));
      memcpy(to.out, operand[to.argument].in, to.bytes);
    }
  } else if (meeting.what == Collective::kBallot) {
    unsigned votes = 0;
    for (int lane : lanes) votes |= unsigned(operand[lane].argument) << lane;
    for (int lane : lanes) *static_cast<unsigned*>(operand[lane].out) = votes;
  } else if (meeting.what == Collective::kLoadMatrix) {
    ++record->report.load_matrix;
    load_matrices(warp, operand);
  } else if (meeting.what == Collective::kWgmma) {
    issue_wgmma(warp, operand);
  } else if (meeting.what == Collective::kWgmmaFence) {
    warps[warp].fenced = true;
  } else if (meeting.what == Collective::kWgmmaCommit) {
    ++warps[warp].committed;
    warps[warp].fenced = false;
  } else if (meeting.what == Collective::kWgmmaWait) {
    wait_wgmma(warp, operand->argument);
  } else {
    ++record->report.mma;
    if (operand->argument == kBf16) multiply<uint16_t, from_bf16>(operand);
    if (operand->argument == kF16) multiply<uint16_t, from_f16>(operand);
    if (operand->argument == kTf32) multiply<uint32_t, from_tf32>(operand);
  }
}

void meet_at(Barrier& barrier, int wanted);

const char* const kCollectiveNames[] = {"__syncwarp",  "a shuffle",    "a vote",
                                        "ldmatrix",    "mma",          "wgmma",
                                        "wgmma_fence", "wgmma_commit", "wgmma_wait"};

}  // namespace

void meet(Collective what, unsigned mask, const Operand& operand) {
  Thread& thread = *self;
  const int lane = thread.index % 32, number = thread.index / 32;
  thread.site = CALL_SITE;
  thread.waits_at = kCollectiveNames[int(what)];
  if (!(mask >> lane & 1))
    fail("the mask of ", thread.waits_at, " is without the calling lane", at(thread.site));
  Warp& warp = warps[number];
  Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
  if (!meeting.arrived) {
    meeting.what = what;
    meeting.mask = mask;
  } else if (meeting.what != what || meeting.mask != mask) {
    fail("the lanes of a warp meet at different collectives: ", who_waits_where());
  }
  warp.operand[lane] = operand;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived != mask) return leave();
  meeting.arrived = 0;
  perform(number, meeting);
  if (options.count && mask == ~0u) flush(warp);
  // Wake the others, in another order, before or after the threads that were ready already.
  const unsigned turn = random_below(64);
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned other = (i ^ turn) % 32;
    if (int(other) != lane && mask >> other & 1)
      push_ready(threads[number * 32 + other], turn & 32);
  }
}

void named_barrier(int id, int wanted) {
  Thread& thread = *self;
  thread.site = CALL_SITE;
  thread.waits_at = id ? "a named barrier" : "__syncthreads";
  if (id < 0 || id > 15 || wanted <= 0 || wanted > int(blockDim.x) ||
      (wanted % 32 && wanted != int(blockDim.x)))
    fail("barrier ", id, " of ", wanted, " threads", at(thread.site));
  meet_at(barriers[id], wanted);
}

namespace {

void meet_at(Barrier& barrier, int wanted) {
  Thread& thread = *self;
  if (barrier.arrived.empty()) barrier.wanted = wanted;
  if (barrier.wanted != wanted)
    fail("threads come to one barrier with different counts: ", who_waits_where());
  barrier.arrived.push_back(&thread);
  if (int(barrier.arrived.size()) < wanted) return leave();
  ++record->report.barriers;
  std::vector<Thread*> arrived;
  arrived.swap(barrier.arrived);
  join_clocks(arrived);
  shuffle_order(arrived.data(), arrived.size());
  for (Thread* other : arrived) {
    if (other != &thread) push_ready(*other, false);
    if (options.count && other->index % 32 == 0) flush(warps[other->index / 32]);
  }
}

}  // namespace

void* shared_memory() { return shared; }

void cp_async(void* smem, const void* global, int bytes) {
  Thread& thread = *self;
  const void* site = CALL_SITE;
  if (reinterpret_cast<uintptr_t>(smem) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fail("a cp.async address is not aligned to 16 bytes", at(site));
  if (bytes < 0 || bytes > 16) fail("cp.async of ", bytes, " bytes", at(site));
  note(thread, smem, 16, kAsyncWrite, site);
  if (bytes) note(thread, global, bytes, kAsyncRead, site);
  memset(smem, 0xff, 16);
  thread.copies.push_back({(char*)smem, (const char*)global, bytes, thread.committed, site});
}

void cp_async_commit() { ++self->committed; }

void cp_async_wait(int pending) {
  Thread& thread = *self;
  std::vector<Copy>& copies = thread.copies;
  auto copy = copies.begin();
  for (; copy != copies.end() && copy->group < thread.committed - pending; ++copy) {
    note(thread, copy->smem, 16, kArrival, copy->site);
    memcpy(copy->smem, copy->global, copy->bytes);
    memset(copy->smem + copy->bytes, 0, 16 - copy->bytes);
  }
  copies.erase(copies.begin(), copy);
}

void note_atomic(const void* address, int bytes, const void* site) {
  ++record->report.atomics;
  site = static_cast<const char*>(site) - 1;
  if (watched) check_alignment(address, bytes, kAtomic, site);
  note(*self, address, bytes, kAtomic, site);
}

uint32_t shared_address(const void* smem) {
  const uint64_t offset = static_cast<const char*>(smem) - shared;
  if (offset > shared_bytes) fail("the address of what is not in shared memory", at(CALL_SITE));
  return kSharedBase + offset;
}

void fence_proxy() {
  Thread& thread = *self;
  if (options.check_races) thread.fences.push_back(thread.clock++);
}

void barrier_init(uint64_t* barrier, int arrivals) {
  const void* site = CALL_SITE;
  if (!inside(barrier, 8) || reinterpret_cast<uintptr_t>(barrier) % 8)
    fail("an mbarrier that is not 8 bytes of shared memory", at(site));
  if (arrivals < 1 || arrivals >= 1 << 20) fail("an mbarrier of ", arrivals, " arrivals", at(site));
  note_barrier(barrier, kWrite, site);
  size_t number = 0;
  while (number < phasers.size() && phasers[number].address != reinterpret_cast<char*>(barrier))
    ++number;
  if (number == kMaxPhasers) fail("more mbarriers than the emulator holds", at(site));
  Phaser fresh{reinterpret_cast<char*>(barrier), arrivals, arrivals};
  if (number == phasers.size()) phasers.emplace_back();
  // Phases are counted on, for the clock of copies; parity starts with 0.
  fresh.phase = (phasers[number].phase + 1) / 2 * 2;
  if (options.check_races) fresh.arrived.resize(self->seen->size());
  fresh.ended = std::make_shared<const Clocks>(self->seen->size());
  phasers[number] = std::move(fresh);
  const uint64_t state = number ^ kPhaserMagic;
  memcpy(barrier, &state, 8);
}

void barrier_arrive(uint64_t* barrier, int expected_bytes) {
  Thread& thread = *self;
  const void* site = CALL_SITE;
  const int number = phaser_of(barrier, site);
  note_barrier(barrier, kAtomic, site);
  Phaser& p = phasers[number];
  if (!p.pending)
    fail("more arrivals than the ", p.count, " of the mbarrier at shared memory + ",
         p.address - shared, at(site));
  if (options.check_races) {
    merge(p.arrived, *thread.seen);
    p.arrived[thread.index] = thread.clock++;
  }
  p.bytes += expected_bytes;
  --p.pending;
  end_phase_if_complete(number);
}

void barrier_wait(uint64_t* barrier, int parity) {
  Thread& thread = *self;
  const void* site = CALL_SITE;
  const int number = phaser_of(barrier, site);
  note_barrier(barrier, kAtomic, site);
  if (parity != 0 && parity != 1) fail("parity ", parity, at(site));
  const uint32_t phase = phasers[number].phase;
  while (int(phasers[number].phase & 1) == parity) {
    thread.site = site;
    thread.waits_at = "barrier_wait";
    thread.waits_for = number;
    thread.parity = parity;
    phasers[number].waiting.push_back(thread.index);
    leave();
    thread.waits_for = -1;
    if (phasers[number].phase > phase + 1)
      fail("the next phase has ended, too, before a thread has seen the end of its phase",
           at(site));
  }
  see(thread, phasers[number].ended);
}

cudaError_t make_map(void* map, const void* data, int element_bytes, int64_t rows, int64_t cols,
                     int64_t row_stride, int box_rows, int box_cols) {
  const int64_t row_bytes = row_stride * element_bytes;
  if (reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(data) % 16 ||
      row_bytes < 0 || row_bytes % 16 || row_bytes >= int64_t(1) << 40 || rows < 1 || cols < 1 ||
      rows > int64_t(1) << 32 || cols > int64_t(1) << 32 || box_rows < 1 || box_rows > 256 ||
      box_cols * element_bytes != 128)
    return cudaErrorInvalidValue;
  const MatrixMap m{
      kMapMagic, static_cast<const char*>(data), rows, cols, row_bytes, element_bytes, box_rows,
      {}};
  static_assert(sizeof m == 128);
  memcpy(map, &m, sizeof m);
  return cudaSuccess;
}

void tensor_copy(void* smem, const void* map, int col, int row, uint64_t* barrier) {
  Thread& thread = *self;
  const void* site = CALL_SITE;
  TensorCopy copy{{}, thread.index, col, row, 0, 0, static_cast<char*>(smem), site};
  memcpy(&copy.map, map, sizeof copy.map);
  if (reinterpret_cast<uintptr_t>(map) % 64 || copy.map.magic != kMapMagic)
    fail("a tensor copy without a tensor map aligned to 64 bytes", at(site));
  const int64_t bytes = int64_t(copy.map.box_rows) * 128;
  const int64_t offset = copy.smem - shared;
  if (!inside(smem, bytes) || offset % 1024)
    fail("a tensor copy of ", bytes, " bytes to shared memory + ", offset, " of ", shared_bytes,
         ": outside, or not aligned to 1024", at(site));
  copy.phaser = phaser_of(barrier, site);
  copy.phase = phasers[copy.phaser].phase;
  note_barrier(barrier, kAtomic, site);
  Mark now{block, copy.phase + 1, 0, clock_of_phaser(copy.phaser), false};
  if (watched && options.check_races) {
    now.site = site_of(site, kTensorWrite, true);
    check_order(thread, now, copy.smem - arena, bytes);
  }
  memset(copy.smem, 0xff, bytes);
  if (watched) {
    now.site = site_of(site, kTensorRead, false);
    for_lines(copy, [&](int, int, const char* from, int64_t count) {
      if (!buffer_of(from - arena, count)) fail("tensor read outside every buffer", at(site));
      if (options.check_races) check_order(thread, now, from - arena, count);
      if (options.count) count_copy(now.site, from, count);
    });
    if (options.count) ++counters[now.site].requests;
  }
  ++record->report.tensor_copies;
  record->report.tensor_copy_bytes += bytes;
  tensor_copies.push_back(copy);
}

namespace {

void run_block() {
  const unsigned count = blockDim.x;
  if (shared_bytes) memset(shared, 0xff, shared_bytes);
  blockIdx = block_at(block);
  const auto seen = std::make_shared<const Clocks>(count + kMaxPhasers + count / 32);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread = {.fibre = thread.fibre, .index = int(i), .seen = seen};
    prepare(thread.fibre, i, enter);
    ready[i] = i;
  }
  for (Warp& warp : warps) {
    for (Meeting& meeting : warp.meetings) meeting.arrived = 0;
    warp.products.clear();
    warp.committed = warp.issued = warp.clock = 0;
    warp.fenced = false;
  }
  for (Barrier& barrier : barriers) barrier.arrived.clear();
  phasers.clear();
  tensor_copies.clear();
  warpgroups.assign((count + 127) / 128, {});
  shuffle_order(ready.data(), count);
  alive = ready_count = count;
  ready_head = 0;
  error.clear();
  run_next(main_fibre);
  if (alive && error.empty() && race_sites.size() < kMaxRaces)
    error = block_name(block) + ": deadlock: " + who_waits_where();
  if (options.count)
    for (unsigned i = 0; i < (count + 31) / 32; ++i) flush(warps[i]);
}

void sum_counters() {
  LaunchReport& report = record->report;
  for (uint32_t i = 0; i < sites.size(); ++i) {
    const SiteReport& c = counters[i];
    if (!c.requests) continue;
    record->sites.push_back(i);
    report.sites.push_back(c);
    report.shared_wavefronts += c.wavefronts;
    report.bank_conflicts += c.conflicts;
    if (sites[i].shared) continue;
    const bool write = writes(sites[i].kind);
    (write ? report.global_write_bytes : report.global_read_bytes) += c.bytes;
    (write ? report.global_write_sectors : report.global_read_sectors) += c.sectors;
  }
}

}  // namespace

cudaError_t run(const void* kernel, const std::function<void()>& kernel_body, dim3 grid,
                int thread_count, int bytes) {
  if (thread_count < 1 || thread_count > kMaxBlockThreads || bytes < 0 || bytes > kMaxShared ||
      !grid.x || grid.x > 0x7fffffff || !grid.y || grid.y > 65535 || !grid.z || grid.z > 65535)
    return cudaErrorInvalidValue;
  records.push_back({});
  record = &records.back();
  record->kernel = kernel;
  record->report.grid = gridDim = grid;
  record->report.threads = blockDim.x = thread_count;
  record->report.shared_bytes = shared_bytes = bytes;
  body = &kernel_body;
  ++launches;
  random_state = options.seed << 32 | records.size();
  order.resize(size_t(grid.x) * grid.y * grid.z);
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  shuffle_order(order.data(), order.size());
  race_sites.clear();
  races.clear();
  counters.assign(sites.size(), SiteReport());
#ifdef __SANITIZE_ADDRESS__
  if (posix_memalign(reinterpret_cast<void**>(&shared), 1024, bytes)) throw std::bad_alloc();
#else
  shared = arena;
  watched = options.check_races || options.count ? kArenaBytes : 0;
#endif
  for (uint32_t i = 0; i < order.size() && error.empty() && race_sites.size() < kMaxRaces; ++i) {
    block = first_block + i;
    run_block();
  }
  watched = 0;
#ifdef __SANITIZE_ADDRESS__
  free(shared);
#endif
  sum_counters();
  const std::string message = races + std::exchange(error, "");
  first_block += order.size();
  if (message.empty()) return cudaSuccess;
  throw std::runtime_error(text(place_of(kernel).function, ": ", message));
}

void configure(const Options& wanted) { options = wanted; }

void* allocate(const std::string& name, size_t bytes) {
  char* memory;
#ifdef __SANITIZE_ADDRESS__
  if (posix_memalign(reinterpret_cast<void**>(&memory), 256, bytes)) throw std::bad_alloc();
#else
  if (!arena) {
    arena = reserve(kArenaBytes);
    cells = reinterpret_cast<Cell*>(reserve(kCellsBytes));
    read_in = reinterpret_cast<uint32_t*>(reserve(kStampsBytes));
    written_in = reinterpret_cast<uint32_t*>(reserve(kStampsBytes));
  }
  if (bytes > kArenaBytes - arena_used - 2 * kGap) throw std::bad_alloc();
  memory = arena + arena_used;
  arena_used += (bytes + 2 * kGap - 1) / kGap * kGap;
#endif
  memset(memory, 0xff, bytes);
  buffers.push_back({name, memory, bytes});
  return memory;
}

void release_all() {
#ifdef __SANITIZE_ADDRESS__
  for (Buffer& buffer : buffers) free(buffer.begin);
#else
  if (arena) {
    madvise(arena, kArenaBytes, MADV_DONTNEED);
    madvise(cells, kCellsBytes, MADV_DONTNEED);
    madvise(read_in, kStampsBytes, MADV_DONTNEED);
    madvise(written_in, kStampsBytes, MADV_DONTNEED);
  }
  arena_used = kSharedRoom;
#endif
  buffers.clear();
}

std::vector<LaunchReport> reports() {
  std::set<const void*> addresses;
  for (const Record& r : records) {
    addresses.insert(r.kernel);
    for (uint32_t index : r.sites) addresses.insert(sites[index].address);
  }
  find_places(addresses);
  std::vector<LaunchReport> out;
  for (const Record& r : records) {
    LaunchReport& report = out.emplace_back(r.report);
    report.kernel = places[r.kernel].function;
    for (size_t i = 0; i < r.sites.size(); ++i) {
      const Site& site = sites[r.sites[i]];
      report.sites[i].where = places[site.address].line;
      report.sites[i].kind = text(site.shared ? "shared " : "global ", kKindNames[site.kind]);
    }
  }
  return out;
}

void reset() { records.clear(); }

}  // namespace simt

#ifndef __SANITIZE_ADDRESS__
namespace {
__attribute__((always_inline)) inline void hook(const void* address, size_t bytes, bool aligned,
                                                bool write, const void* site) {
  using namespace simt;
  if (size_t(static_cast<const char*>(address) - arena) >= watched) return;
  const Kind kind = write ? kWrite : kRead;
  if (aligned) check_alignment(address, bytes, kind, site);
  // A larger object is so many instructions of at most 16 bytes.
  const char* from = static_cast<const char*>(address);
  for (size_t done = 0; done < bytes; done += 16)
    note(*self, from + done, std::min<size_t>(16, bytes - done), kind, site);
}
}  // namespace

extern "C" {
#define HOOKS(size)                                                                     \
  void __tsan_read##size(void* p) { hook(p, size, true, false, CALL_SITE); }            \
  void __tsan_write##size(void* p) { hook(p, size, true, true, CALL_SITE); }            \
  void __tsan_unaligned_read##size(void* p) { hook(p, size, false, false, CALL_SITE); } \
  void __tsan_unaligned_write##size(void* p) { hook(p, size, false, true, CALL_SITE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) { hook(p, n, false, false, CALL_SITE); }
void __tsan_write_range(void* p, size_t n) { hook(p, n, false, true, CALL_SITE); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
#endif
