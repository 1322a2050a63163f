// Asynchronous copies. A cp.async arrives when its thread waits for it. A tensor copy arrives at a
// time that the seed decides. Until then the destination is NaN.
#include <algorithm>

#include "internal.h"

namespace simt {
namespace {

constexpr uint64_t kMapMagic = 0x74656e736f724d61;

// The description that the emulator keeps in the 128 bytes of a CUtensorMap.
struct MatrixMap {
  uint64_t magic;
  const char* data;
  int64_t rows, cols, row_bytes;
  int32_t element_bytes, box_rows;
  uint64_t padding[10];

  int64_t box_bytes() const { return int64_t(box_rows) * 128; }
};
static_assert(sizeof(MatrixMap) == 128);

struct TensorCopy {
  MatrixMap map;
  int thread, col, row, mbarrier;
  uint32_t phase;
  char* smem;
  const void* site;
};
std::vector<TensorCopy> tensor_copies;  // those that have not arrived

// Calls f(line of the box, byte within the line, address, bytes) for the part of each line that
// lies in the matrix.
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
  Mbarrier& m = mbarriers[copy.mbarrier];
  self = &threads[copy.thread];
  if (m.phases != copy.phase)
    fail(
        "the phase ended before its copy came: more bytes are copied than expected by the mbarrier",
        at(copy.site));
  memset(copy.smem, 0, copy.map.box_bytes());
  for_lines(copy, [&](int line, int byte, const char* from, int64_t bytes) {
    char whole[128] = {};
    memcpy(whole + byte, from, bytes);
    for (int chunk = 0; chunk < 8; ++chunk)
      memcpy(copy.smem + line * 128 + (chunk ^ (line & 7)) * 16, whole + chunk * 16, 16);
  });
  m.missing_bytes -= copy.map.box_bytes();
  end_phase_if_complete(copy.mbarrier);
}

// For the race check the mbarrier is the actor, and its phases are its steps.
void check_and_count(const TensorCopy& copy) {
  Mark now{block, copy.phase + 1, 0, actor_of_mbarrier(copy.mbarrier), false};
  if (options.check_races) {
    now.site = site_of(copy.site, kTensorWrite, true);
    check_order(*self, now, copy.smem - arena, copy.map.box_bytes());
  }
  now.site = site_of(copy.site, kTensorRead, false);
  for_lines(copy, [&](int, int, const char* from, int64_t bytes) {
    if (!buffer_of(from - arena, bytes)) fail("tensor read outside every buffer", at(copy.site));
    if (options.check_races) check_order(*self, now, from - arena, bytes);
    if (options.count) count_copied_line(now.site, from, bytes);
  });
  if (options.count) count_copy(now.site);
}

}  // namespace

void cp_async(void* smem, const void* global, int bytes) {
  Thread& thread = *self;
  const void* site = CALL_SITE;
  if (reinterpret_cast<uintptr_t>(smem) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fail("a cp.async address is not aligned to 16 bytes", at(site));
  if (bytes < 0 || bytes > 16) fail("cp.async copies 0 to 16 bytes, got ", bytes, at(site));
  note(thread, smem, 16, kAsyncWrite, site);
  if (bytes) note(thread, global, bytes, kAsyncRead, site);
  memset(smem, 0xff, 16);
  thread.async_copies.push_back(
      {(char*)smem, (const char*)global, bytes, thread.committed_groups, site});
}

void cp_async_commit() { ++self->committed_groups; }

void cp_async_wait(int pending) {
  Thread& thread = *self;
  std::vector<AsyncCopy>& copies = thread.async_copies;
  auto copy = copies.begin();
  for (; copy != copies.end() && copy->group < thread.committed_groups - pending; ++copy) {
    note(thread, copy->smem, 16, kArrival, copy->site);
    memcpy(copy->smem, copy->global, copy->bytes);
    memset(copy->smem + copy->bytes, 0, 16 - copy->bytes);
  }
  copies.erase(copies.begin(), copy);
}

cudaError_t make_map(void* map, const void* data, int element_bytes, int64_t rows, int64_t cols,
                     int64_t row_stride, int box_rows, int box_cols) {
  const int64_t row_bytes = row_stride * element_bytes;
  if (reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(data) % 16 ||
      row_bytes < 0 || row_bytes % 16 || row_bytes >= int64_t(1) << 40 || rows < 1 || cols < 1 ||
      rows > int64_t(1) << 32 || cols > int64_t(1) << 32 || box_rows < 1 || box_rows > 256 ||
      box_cols * element_bytes != 128)
    return cudaErrorInvalidValue;
  ++counted.maps;
  const MatrixMap m{
      kMapMagic, static_cast<const char*>(data), rows, cols, row_bytes, element_bytes, box_rows,
      {}};
  memcpy(map, &m, sizeof m);
  return cudaSuccess;
}

void tensor_copy(void* smem, const void* map, int col, int row, uint64_t* barrier) {
  const void* site = CALL_SITE;
  TensorCopy copy{{}, self->index, col, row, 0, 0, static_cast<char*>(smem), site};
  memcpy(&copy.map, map, sizeof copy.map);
  if (reinterpret_cast<uintptr_t>(map) % 64 || copy.map.magic != kMapMagic)
    fail("the map of this tensor copy is not from make_tensor_map, or not aligned to 64 bytes",
         at(site));
  const int64_t bytes = copy.map.box_bytes(), offset = copy.smem - shared;
  if (!inside_shared(smem, bytes) || offset % 1024)
    fail("a tensor copy of ", bytes, " bytes to shared memory + ", offset, " of ", shared_bytes,
         " is out of bounds or not aligned to 1024", at(site));
  copy.mbarrier = mbarrier_of(barrier, site);
  copy.phase = mbarriers[copy.mbarrier].phases;
  note_mbarrier(barrier, kAtomic, site);
  if (watched) check_and_count(copy);
  memset(copy.smem, 0xff, bytes);
  ++record->report.tensor_copies;
  record->report.tensor_copy_bytes += bytes;
  tensor_copies.push_back(copy);
}

void start_copies() { tensor_copies.clear(); }

void deliver_some_copies() {
  Thread* const me = self;
  while (!tensor_copies.empty() && (!any_ready() || random_below(4) == 0)) {
    std::swap(tensor_copies[random_below(tensor_copies.size())], tensor_copies.back());
    const TensorCopy copy = tensor_copies.back();
    tensor_copies.pop_back();
    deliver(copy);
  }
  self = me;
}

void check_copies_at_exit() {
  if (!tensor_copies.empty())
    fail("the block exits before its copy has arrived, started", at(tensor_copies[0].site));
}

}  // namespace simt
