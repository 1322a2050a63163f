// The counts: accesses of lanes become requests of warps, and requests become sectors of global
// memory or wavefronts of shared memory.
#include <sys/mman.h>

#include <algorithm>

#include "internal.h"

namespace simt {

std::vector<Site> sites;
LaunchRecord* record;

namespace {

constexpr size_t kStampsBytes = kArenaBytes / kSector * sizeof(uint32_t);
uint32_t *read_in, *written_in;  // by sector: the last launch that read or wrote it

std::vector<LaunchRecord> records;
std::vector<uint32_t> site_slots(1 << 16);  // a hash table of 1 + the index of a site
std::vector<SiteReport> counters;           // by site, of this launch
std::array<WarpRequests, kMaxBlockThreads / 32> warp_requests;

// Shared memory serves in one wavefront at most 128 bytes, and one word from each of 32 banks.
void count_wavefronts(const Request& request, SiteReport& counter) {
  const int widest = *std::max_element(request.bytes, request.bytes + 32);
  const int lanes = widest <= 4 ? 32 : widest <= 8 ? 16 : 8;
  for (int first = 0; first < 32; first += lanes) {
    uint32_t words[32][32];
    uint8_t count[32] = {};
    unsigned worst = 0;
    for (int lane = first; lane < first + lanes; ++lane) {
      if (!(request.lanes >> lane & 1)) continue;
      const uint64_t begin = request.offset[lane], last = begin + request.bytes[lane] - 1;
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

void count_sectors(const Request& request, bool write, SiteReport& counter) {
  LaunchReport& report = record->report;
  uint64_t& unique = write ? report.global_unique_write_sectors : report.global_unique_read_sectors;
  uint64_t sectors[64];
  int count = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(request.lanes >> lane & 1)) continue;
    const uint64_t begin = request.offset[lane], last = begin + request.bytes[lane] - 1;
    for (uint64_t sector = begin / kSector; sector <= last / kSector; ++sector) {
      if (std::find(sectors, sectors + count, sector) != sectors + count) continue;
      sectors[count++] = sector;
      uint32_t& stamp = (write ? written_in : read_in)[sector];
      unique += std::exchange(stamp, launches) != launches;
    }
  }
  counter.sectors += count;
}

}  // namespace

void reserve_stamps() {
  read_in = reinterpret_cast<uint32_t*>(reserve(kStampsBytes));
  written_in = reinterpret_cast<uint32_t*>(reserve(kStampsBytes));
}
void release_stamps() {
  madvise(read_in, kStampsBytes, MADV_DONTNEED);
  madvise(written_in, kStampsBytes, MADV_DONTNEED);
}

void start_counts(const void* kernel) {
  records.push_back({});
  record = &records.back();
  record->kernel = kernel;
  counters.assign(sites.size(), SiteReport());
}
size_t launches_recorded() { return records.size(); }

void end_counts() {
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

uint32_t site_of(const void* address, AccessKind kind, bool is_shared) {
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

// Adds a lane's access to a request of its warp. The n-th time that a lane executes a site, it
// joins the site's n-th request, whichever lane comes first.
void join_request(int thread, uint32_t site, uint64_t offset, int bytes) {
  WarpRequests& warp = warp_requests[thread / 32];
  std::vector<Request>& requests = warp.requests;
  const int lane = thread % 32;
  const auto joined = [&](int request) { return requests[request].lanes >> lane & 1; };
  const auto is_next = [&](int request) {
    const Request& r = requests[request];
    return r.site == site && !joined(request) && (r.previous < 0 || joined(r.previous));
  };
  int request = warp.cursor[lane] + 1;  // most often right
  if (request >= int(requests.size()) || !is_next(request)) {
    if (warp.last.size() <= site) warp.last.resize(site + 64, -1);
    int& last = warp.last[site];
    if (last < 0 || joined(last)) {
      requests.push_back({site, last, 0, {}, {}});
      last = requests.size() - 1;
    }
    for (request = last; !is_next(request);) request = requests[request].previous;
  }
  warp.cursor[lane] = request;
  requests[request].lanes |= 1u << lane;
  requests[request].bytes[lane] = bytes;
  requests[request].offset[lane] = offset;
}

// Counts the requests of a warp whose lanes have met: no other lane can join them.
void count_requests(int number) {
  WarpRequests& warp = warp_requests[number];
  for (const Request& request : warp.requests) {
    const Site& site = sites[request.site];
    SiteReport& counter = counters[request.site];
    ++counter.requests;
    for (int bytes : request.bytes) counter.bytes += bytes;
    if (site.shared) count_wavefronts(request, counter);
    if (!site.shared) count_sectors(request, writes(site.kind), counter);
    warp.last[request.site] = -1;
  }
  warp.requests.clear();
  std::fill_n(warp.cursor, 32, -1);
}

// A tensor copy is one request, which reads line after line.
void count_copy(uint32_t site) { ++counters[site].requests; }
void count_copied_line(uint32_t site, const char* from, int64_t bytes) {
  SiteReport& counter = counters[site];
  const uint64_t begin = (from - arena) / kSector, end = (from + bytes - 1 - arena) / kSector + 1;
  counter.bytes += bytes;
  counter.sectors += end - begin;
  for (uint64_t sector = begin; sector < end; ++sector)
    record->report.global_unique_read_sectors +=
        std::exchange(read_in[sector], launches) != launches;
}

std::vector<LaunchReport> reports() {
  std::set<const void*> addresses;
  for (const LaunchRecord& r : records) {
    addresses.insert(r.kernel);
    for (uint32_t index : r.sites) addresses.insert(sites[index].address);
  }
  find_locations(addresses);
  std::vector<LaunchReport> out;
  for (const LaunchRecord& r : records) {
    LaunchReport& report = out.emplace_back(r.report);
    report.kernel = location_of(r.kernel).function;
    for (size_t i = 0; i < r.sites.size(); ++i) {
      const Site& site = sites[r.sites[i]];
      report.sites[i].where = location_of(site.address).line;
      report.sites[i].kind = text(site.shared ? "shared " : "global ", kKindNames[site.kind]);
    }
  }
  return out;
}

void reset() {
  counted = {};
  records.clear();
}

}  // namespace simt
