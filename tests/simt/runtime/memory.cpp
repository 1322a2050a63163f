// The memory of kernels: shared memory and the global buffers, and the checks of every access.
// GCC's -fsanitize=thread makes kernels call the hooks at the end before each access; the runtime
// itself is compiled without it. Under AddressSanitizer memory comes from malloc, and there are no
// hooks.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "internal.h"

namespace simt {

char *arena, *shared;
size_t shared_bytes, watched;

namespace {

constexpr size_t kGap = 256;  // between buffers, and their alignment

std::vector<Buffer> buffers;
[[maybe_unused]] size_t arena_used = kSharedRoom;

}  // namespace

char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED)
    throw std::runtime_error(text("no address space for ", bytes, " bytes"));
  return static_cast<char*>(memory);
}

void* allocate(const std::string& name, size_t bytes) {
  char* memory;
#ifdef __SANITIZE_ADDRESS__
  if (posix_memalign(reinterpret_cast<void**>(&memory), 256, bytes)) throw std::bad_alloc();
#else
  if (!arena) {
    arena = reserve(kArenaBytes);
    reserve_shadow();
    reserve_stamps();
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
    release_shadow();
    release_stamps();
  }
  arena_used = kSharedRoom;
#endif
  buffers.clear();
}

void start_memory(size_t bytes) {
  shared_bytes = bytes;
#ifdef __SANITIZE_ADDRESS__
  if (posix_memalign(reinterpret_cast<void**>(&shared), 1024, bytes)) throw std::bad_alloc();
#else
  shared = arena;
  watched = options.check_races || options.count ? kArenaBytes : 0;
#endif
}
void end_memory() {
  watched = 0;
#ifdef __SANITIZE_ADDRESS__
  free(shared);
#endif
}

void* shared_memory() { return shared; }
uint32_t shared_address(const void* smem) {
  const uint64_t offset = static_cast<const char*>(smem) - shared;
  if (offset > shared_bytes)
    fail("shared_address of a pointer that is not to shared memory", at(CALL_SITE));
  return kSharedBase + offset;
}
bool inside_shared(const void* smem, size_t bytes) {
  const size_t offset = static_cast<const char*>(smem) - shared;
  return offset < shared_bytes && bytes <= shared_bytes - offset;
}

// The buffer that holds all of these bytes of the arena, or null.
const Buffer* buffer_of(uint64_t offset, int bytes) {
  const char* begin = arena + offset;
  auto b = std::upper_bound(buffers.begin(), buffers.end(), begin,
                            [](const char* a, const Buffer& buffer) { return a < buffer.begin; });
  return b != buffers.begin() && begin + bytes <= (--b)->begin + b->bytes ? &*b : nullptr;
}

// Checks and counts an access. Addresses outside the arena, such as the fibre's stack, are ignored.
void note(const Thread& thread, const void* address, int bytes, AccessKind kind, const void* site) {
  const uint64_t offset = static_cast<const char*>(address) - arena;
  if (offset >= watched) return;
  const bool is_shared = offset < kSharedRoom;
  if (is_shared ? offset + bytes > shared_bytes : !buffer_of(offset, bytes))
    fail(kKindNames[kind], at(site), " outside ",
         is_shared ? text("shared memory of ", shared_bytes, " bytes") : "every buffer");
  const uint32_t index = site_of(site, kind, is_shared);
  if (options.check_races) check_order(thread, offset, bytes, index);
  if (options.count && kind < kArrival) join_request(thread.index, index, offset, bytes);
}

// A GPU faults where the address of an access is no multiple of its size.
void check_alignment(const void* address, int bytes, AccessKind kind, const void* site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  const int64_t offset = static_cast<const char*>(address) - arena;
  const Buffer* buffer = buffer_of(offset, 1);
  fail("misaligned address: ", kKindNames[kind], at(site), " of ", bytes, " bytes at ",
       buffer ? buffer->name : "shared memory", " + ",
       buffer ? static_cast<const char*>(address) - buffer->begin : offset);
}

void note_atomic(const void* address, int bytes, const void* site) {
  ++record->report.atomics;
  site = static_cast<const char*>(site) - 1;
  if (watched) check_alignment(address, bytes, kAtomic, site);
  note(*self, address, bytes, kAtomic, site);
  if (watched && options.check_races) order_atomic(address);
}

}  // namespace simt

#ifndef __SANITIZE_ADDRESS__
namespace {
// GCC calls the unaligned hooks where the type promises less alignment than the access has bytes.
// nvcc splits such an access, so its address is not checked.
__attribute__((always_inline)) inline void hook(const void* address, size_t bytes, bool aligned,
                                                bool write, const void* site) {
  using namespace simt;
  if (size_t(static_cast<const char*>(address) - arena) >= watched) return;
  const AccessKind kind = write ? kWrite : kRead;
  if (aligned) check_alignment(address, bytes, kind, site);
  // A GPU accesses a larger object by instructions of at most 16 bytes.
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
