// Declarations that the files of the emulator's runtime share. simt.cmake compiles them as one
// unit, so that the functions that every access to memory runs through are inlined from one file
// into another.
#pragma once

#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "simt.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// The instruction that called the current function. The return address points behind it.
#define CALL_SITE (static_cast<const char*>(__builtin_return_address(0)) - 1)

namespace simt {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kAsan = true;
#else
constexpr bool kAsan = false;
#endif
constexpr int kMaxBlockThreads = 1024, kMaxShared = 227 * 1024, kMaxRaces = 5;
constexpr int kMaxMbarriers = 128;  // in a block

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// location.cpp: the source line of an instruction.

struct Location {
  std::string function;  // the outermost function: a kernel
  std::string line;      // "tile.cuh:80", of the innermost frame that is none of the emulator's
};
const Location& location_of(const void* address);
void find_locations(const std::set<const void*>& addresses);
std::string at(const void* site);  // " at tile.cuh:80"

// scheduler.cpp: fibres, and the choice of the one that runs.

struct Fibre {
  char* stack = nullptr;
  const void* bottom = nullptr;  // with `bytes` the extent that AddressSanitizer must know
  size_t bytes = 0;
#ifdef __x86_64__
  void* top = nullptr;
#else
  ucontext_t context;
#endif
};

// A vector clock. The actors of a block are its threads, its mbarriers (whose copies write memory)
// and its warps (whose wgmma read it), in this order. Each actor counts its own steps; the clock
// holds the latest step of each actor that happens before a given time.
using Clocks = std::vector<uint32_t>;
// The clocks of several blocks of a launch, by their numbers.
using BlockClocks = std::map<uint32_t, std::shared_ptr<const Clocks>>;

// A cp.async that its thread has not waited for.
struct AsyncCopy {
  char* smem;
  const char* global;
  int bytes, group;
  const void* site;
};

struct Thread {
  Fibre fibre;
  int index;
  std::shared_ptr<const Clocks> seen;  // the steps that happen before the thread's next access
  uint32_t clock = 1;                  // the thread's own step, which a barrier or an arrival ends
  std::vector<AsyncCopy> async_copies = {};
  int committed_groups = 0;
  std::vector<uint32_t> fences = {};  // steps that ended with fence_proxy
  // Of all blocks: the steps that happen before the thread's next access, those before its last
  // __threadfence, and those that atomics have met, which come before what follows the next one.
  std::shared_ptr<const BlockClocks> others = {}, fenced = {}, met = {};
  const char* waits_at = nullptr;  // the kind of barrier or collective, or null
  const void* site = nullptr;
  int waited_mbarrier = -1, waited_parity = 0;
  bool exited = false;
};

extern std::array<Thread, kMaxBlockThreads> threads;
extern Thread* self;       // the thread that runs
extern Fibre main_fibre;   // the fibre of run()
extern int running;        // threads of the block that have not exited
extern std::string error;  // the message of a launch that has failed

void start_fibre(Fibre& fibre, int index);
void start_threads();
// Puts a thread first or last among those that are ready to run.
void push_ready(const Thread& thread, bool first);
bool any_ready();
// Runs threads that are ready, and returns when another thread has made this one ready again.
void suspend();
// Ends the launch. No fibre of it is resumed.
[[noreturn]] void abandon();
[[noreturn]] void fail_with(const std::string& what);
template <class... Parts>
[[noreturn]] void fail(const Parts&... what) {
  fail_with(text(what...));
}
// "threads 0-15: __syncthreads at tile.cuh:33; threads 16-31: exited"
std::string who_waits_where();

// memory.cpp: buffers, and the checks of every access.

// The build whose accesses are instrumented keeps all memory of kernels in one arena: shared
// memory, then the buffers. Pages cost nothing until they are touched, so the arena and what is
// kept about its bytes reserve addresses only.
constexpr size_t kSharedRoom = 256 << 10;
constexpr size_t kArenaBytes = size_t(32) << 30, kSector = 32, kPage = 4096;
constexpr uint32_t kSharedBase = 1024;  // shared_address of the first byte of shared memory

struct Buffer {
  std::string name;
  char* begin;
  size_t bytes;
};

enum AccessKind : uint8_t {
  kRead,
  kWrite,
  kMatrixRead,
  kAsyncRead,
  kWgmmaRead,
  kTensorRead,
  kAsyncWrite,
  kArrival,  // the write of a cp.async's data at the wait
  kAtomic,
  kTensorWrite
};
inline const char* const kKindNames[] = {
    "read",        "write",          "ldmatrix",         "cp.async read", "wgmma read",
    "tensor read", "cp.async write", "cp.async arrival", "atomic",        "tensor copy"};
inline bool writes(AccessKind kind) { return kind == kWrite || kind >= kAsyncWrite; }

extern char *arena, *shared;
extern size_t shared_bytes;
extern size_t watched;  // bytes of the arena whose accesses are checked: 0 outside a launch

char* reserve(size_t bytes);
void start_memory(size_t bytes);  // allocates the launch's shared memory
void end_memory();
const Buffer* buffer_of(uint64_t offset, int bytes);
bool inside_shared(const void* smem, size_t bytes);
void note(const Thread& thread, const void* address, int bytes, AccessKind kind, const void* site);
void check_alignment(const void* address, int bytes, AccessKind kind, const void* site);

// races.cpp: the race check, which compares vector clocks.

// An access, as the race check remembers it.
struct Mark {
  uint32_t block = 0, clock = 0, site = 0;
  uint16_t actor = 0;  // an index of Clocks
  bool atomic = false;
};

extern std::string races;
extern std::set<std::pair<uint32_t, uint32_t>> race_sites;

void reserve_shadow();
void release_shadow();
void start_races();
// Checks an access of `thread` itself.
void check_order(const Thread& thread, uint64_t offset, int bytes, uint32_t site);
// Checks the access `now` of a copy or a wgmma that `thread` has started. Only with `keep` is it
// remembered, so that later accesses are compared with it.
void check_order(const Thread& thread, const Mark& now, uint64_t offset, int bytes,
                 bool keep = true);
// Orders everything that each member has done before everything that any member will do.
void join_clocks(const std::vector<Thread*>& members);
void merge(Clocks& into, const Clocks& other);
// An atomic meets what fences came before the earlier atomics at its address.
void order_atomic(const void* address);
// Orders the steps in `clocks` before everything that the thread will do.
void acquire(Thread& thread, const std::shared_ptr<const Clocks>& clocks);
inline uint16_t actor_of_mbarrier(int mbarrier) { return blockDim.x + mbarrier; }
inline uint16_t actor_of_warp(int warp) { return blockDim.x + kMaxMbarriers + warp; }
inline size_t actors_of_block() { return blockDim.x + kMaxMbarriers + blockDim.x / 32; }

// counts.cpp: requests, sectors and bank conflicts.

// A memory instruction of a kernel.
struct Site {
  const void* address;
  AccessKind kind;
  bool shared;
};
struct LaunchRecord {
  const void* kernel;
  LaunchReport report;
  std::vector<uint32_t> sites;  // in the order of report.sites
};
// One execution of a memory instruction by a warp, as far as its lanes have come.
struct Request {
  uint32_t site;
  int previous;  // the site's request before this one, or -1
  unsigned lanes;
  uint8_t bytes[32];
  uint64_t offset[32];
};
struct WarpRequests {
  std::vector<Request> requests;  // since all lanes of the warp last met
  std::vector<int> last;          // by site: its last request, or -1
  int cursor[32];                 // by lane: the request that it joined last
};

extern std::vector<Site> sites;
extern LaunchRecord* record;  // the running launch's

void start_counts(const void* kernel);
void end_counts();
size_t launches_recorded();
uint32_t site_of(const void* address, AccessKind kind, bool is_shared);
void join_request(int thread, uint32_t site, uint64_t offset, int bytes);
void count_requests(int warp);
void count_copy(uint32_t site);
void count_copied_line(uint32_t site, const char* from, int64_t bytes);
void reserve_stamps();
void release_stamps();

// collectives.cpp and wgmma.cpp: instructions that the lanes of a warp execute together.

struct PendingCollective {
  Collective what;
  unsigned mask, arrived = 0;
};

// The accumulators that one or several unfinished wgmma share. The lanes' own copies are NaN until
// the last of these wgmma has finished.
struct Accumulators {
  float* lane[32];
  int cols, pending = 0;
  float sum[16][256];
};
// A wgmma that its warp has not waited for.
struct PendingWgmma {
  Wgmma what;
  const uint32_t* a[32];
  std::shared_ptr<Accumulators> accumulators;
  int group;
  const void* site;
};

struct Warp {
  PendingCollective collectives[32];  // indexed by the lowest lane of the mask
  Operand operand[32];
  std::vector<PendingWgmma> wgmma = {};
  int committed_groups = 0, issued = 0;
  bool fenced = false;
  uint32_t clock = 0;  // the warp's steps as an actor: waits that have finished wgmma
};
extern std::array<Warp, kMaxBlockThreads / 32> warps;

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline float from_f16(uint16_t bits) {
  const float magnitude = std::bit_cast<float>(uint32_t(bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special |
                              uint32_t(bits & 0x8000) << 16);
}
void start_collectives();
void start_wgmma();
void issue_wgmma(int warp, const Operand* operand);
void wait_wgmma(int warp, int groups);  // until at most so many groups are unfinished
void check_wgmma_at_exit();

// mbarrier.cpp: mbarriers, whose phases wait for arrivals and for copied bytes.

struct Mbarrier {
  char* address;
  int arrivals, missing_arrivals;
  int64_t missing_bytes = 0;
  uint32_t phases = 0;  // number of phases that have ended
  Clocks arrived = {};  // the steps that happen before the arrivals of the current phase
  std::shared_ptr<const Clocks> released = {};  // those that happen before the last phase's end
  std::vector<uint16_t> waiting = {};           // threads
};
extern std::vector<Mbarrier> mbarriers;

int mbarrier_of(const uint64_t* barrier, const void* site);
// Checks an access to the mbarrier's own bytes for races.
void note_mbarrier(const uint64_t* barrier, AccessKind kind, const void* site);
void end_phase_if_complete(int mbarrier);

// copies.cpp: cp.async and tensor copies.

void start_copies();
// Lets some of the tensor copies arrive. All arrive if no thread could run otherwise.
void deliver_some_copies();
void check_copies_at_exit();

// launch.cpp: the running launch, and the random numbers that order it.

extern Options options;
extern Calls counted;
bool may_have(const void* kernel, int shared_bytes);  // whether its limit allows so many
extern uint32_t block;        // the running block; blocks of all launches are numbered from 1
extern uint32_t first_block;  // the launch's first number
extern uint32_t launches;     // number of launches so far
extern const std::function<void()>* body;

std::string block_name(uint32_t number);
uint32_t random_below(uint32_t n);
template <class T>
void shuffle_order(T* begin, size_t n) {
  for (size_t i = n; i > 1; --i) std::swap(begin[i - 1], begin[random_below(i)]);
}

}  // namespace simt
