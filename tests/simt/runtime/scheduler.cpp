// Fibres and their scheduler. A fibre runs until it waits; then the next thread of the ready ring
// runs, or, when no thread is ready, the main fibre, which ends the block.
#include <sys/mman.h>

#include <algorithm>

#include "internal.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

std::array<Thread, kMaxBlockThreads> threads;
Thread* self;
Fibre main_fibre;
int running;
std::string error;

namespace {

constexpr size_t kStackBytes = kAsan ? 512 << 10 : 128 << 10;

std::array<uint16_t, kMaxBlockThreads> ready;  // a ring of threads
unsigned ready_head, ready_count;

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

void run_next(Fibre& from, bool last = false) {
  self = &threads[ready[ready_head++ % kMaxBlockThreads]];
  --ready_count;
  threadIdx.x = self->index;
  // The next thread can be the one that is suspending, if a copy for which it waits has just
  // arrived.
  if (&from != &self->fibre) switch_to(from, self->fibre, last);
}

void leave(bool last) {
  deliver_some_copies();
  Fibre& mine = self->fibre;
  if (ready_count)
    run_next(mine, last);
  else
    switch_to(mine, main_fibre, last);
  self->waits_at = nullptr;
}

// Every fibre starts here.
void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!main_fibre.bottom) main_fibre.bottom = bottom, main_fibre.bytes = bytes;
#endif
  (*body)();
  self->exited = true;
  if (!--running) {
    check_copies_at_exit();
    check_wgmma_at_exit();
  }
  leave(true);
}

}  // namespace

void start_fibre(Fibre& fibre, int index) {
  if (!fibre.stack) {
    fibre.stack = reserve(kStackBytes + kPage);
    mprotect(fibre.stack, kPage, PROT_NONE);
    fibre.bottom = fibre.stack + kPage;
    fibre.bytes = kStackBytes;
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fibre.bottom, fibre.bytes);
#endif
  // The stacks start at different offsets within a page. Otherwise they would all compete for a few
  // lines of the cache.
  const size_t bytes = kStackBytes - index * 832 % kPage / 64 * 64;
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(fibre.stack + kPage + bytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(run_thread);
  fibre.top = top - 6;
  std::fill_n(top - 6, 6, nullptr);
#else
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack + kPage;
  fibre.context.uc_stack.ss_size = bytes;
  makecontext(&fibre.context, run_thread, 0);
#endif
}

// Runs the block's threads until none is ready.
void start_threads() {
  const unsigned count = blockDim.x;
  const auto seen = std::make_shared<const Clocks>(actors_of_block());
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread = {.fibre = thread.fibre, .index = int(i), .seen = seen};
    start_fibre(thread.fibre, i);
    ready[i] = i;
  }
  shuffle_order(ready.data(), count);
  running = ready_count = count;
  ready_head = 0;
  run_next(main_fibre);
}

void push_ready(const Thread& thread, bool first) {
  const unsigned at = first ? --ready_head : ready_head + ready_count;
  ready[at % kMaxBlockThreads] = thread.index;
  ++ready_count;
}
bool any_ready() { return ready_count > 0; }

void suspend() { leave(false); }

void abandon() {
  switch_to(self->fibre, main_fibre);
  __builtin_unreachable();
}
void fail_with(const std::string& what) {
  error = text(block_name(block), " thread ", self->index, ": ", what);
  abandon();
}

std::string who_waits_where() {
  std::map<std::string, std::vector<int>> groups;
  for (unsigned i = 0; i < blockDim.x; ++i) {
    const Thread& t = threads[i];
    std::string where = t.waits_at ? t.waits_at + at(t.site) : t.exited ? "exited" : "run";
    if (t.waits_at && t.waited_mbarrier >= 0) {
      const Mbarrier& m = mbarriers[t.waited_mbarrier];
      where += text(" for parity ", t.waited_parity, " of shared memory + ", m.address - shared,
                    " (", m.phases, " phases ended, ", m.missing_arrivals, " of ", m.arrivals,
                    " arrivals and ", m.missing_bytes, " bytes missing)");
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

}  // namespace simt
