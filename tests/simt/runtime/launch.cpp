// A launch: its blocks, one after another in the seed's order.
#include <algorithm>

#include "internal.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

Options options;
uint32_t block, first_block = 1;  // 0 is no block
uint32_t launches;
const std::function<void()>* body;

namespace {

std::vector<uint32_t> order;  // of the blocks
uint64_t random_state;

dim3 block_at(uint32_t number) {
  const unsigned i = order[number - first_block], x = gridDim.x, y = gridDim.y;
  return {i % x, i / x % y, i / x / y};
}

bool given_up() { return !error.empty() || race_sites.size() >= kMaxRaces; }

void run_block() {
  if (shared_bytes) memset(shared, 0xff, shared_bytes);
  blockIdx = block_at(block);
  start_collectives();
  start_wgmma();
  start_copies();
  mbarriers.clear();
  start_threads();
  if (running && !given_up()) error = block_name(block) + ": deadlock: " + who_waits_where();
  if (options.count)
    for (unsigned i = 0; i < (blockDim.x + 31) / 32; ++i) count_requests(i);
}

}  // namespace

void configure(const Options& wanted) { options = wanted; }

std::string block_name(uint32_t number) {
  const dim3 at = block_at(number);
  return text("block (", at.x, ", ", at.y, ", ", at.z, ")");
}

uint32_t random_below(uint32_t n) {
  random_state += 0x9e3779b97f4a7c15;
  uint64_t z = random_state;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return uint64_t(uint32_t(z ^ z >> 31)) * n >> 32;
}

cudaError_t run(const void* kernel, const std::function<void()>& kernel_body, dim3 grid,
                int thread_count, int bytes) {
  if (thread_count < 1 || thread_count > kMaxBlockThreads || bytes < 0 || bytes > kMaxShared ||
      !may_have(kernel, bytes) || !grid.x || grid.x > 0x7fffffff || !grid.y || grid.y > 65535 ||
      !grid.z || grid.z > 65535)
    return cudaErrorInvalidValue;
  ++counted.launches;
  if (!options.execute) return cudaSuccess;
  start_counts(kernel);
  record->report.grid = gridDim = grid;
  record->report.threads = blockDim.x = thread_count;
  record->report.shared_bytes = bytes;
  body = &kernel_body;
  ++launches;
  random_state = options.seed << 32 | launches_recorded();
  order.resize(size_t(grid.x) * grid.y * grid.z);
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  shuffle_order(order.data(), order.size());
  start_races();
  error.clear();
  start_memory(bytes);
  for (uint32_t i = 0; i < order.size() && !given_up(); ++i) {
    block = first_block + i;
    run_block();
  }
  end_memory();
  end_counts();
  first_block += order.size();
  if (races.empty() && error.empty()) return cudaSuccess;
  throw std::runtime_error(text(location_of(kernel).function, ": ", races, error));
}

}  // namespace simt
