// The source line of an instruction, from the debug information of its module.
#include <dlfcn.h>

#include <cstdio>

#include "internal.h"

namespace simt {
namespace {

std::map<const void*, Location> locations;

// The functions of these files are inlined into kernels, whose lines are wanted instead.
bool is_wrapper(const std::string& line) {
  for (const char* file : {"access.cuh:", "cuda_runtime.h:", "ptx.cuh:", "simt.h:"})
    if (line.starts_with(file)) return true;
  return false;
}

// Makes "tvmf::kernel<float>" of "void tvmf::kernel<float>(Params)". The parameters' types may
// contain parentheses, too.
std::string name_of(char* function) {
  if (char* end = strrchr(function, ')')) {
    for (int depth = 0; end > function; --end)
      if (depth += (*end == ')') - (*end == '('), depth == 0) break;
    *end = 0;
  }
  return function + (strncmp(function, "void ", 5) ? 0 : 5);
}

// addr2line prints for each address a line "0x...", and then two lines for each frame, the
// innermost first: the function, and the file with the line.
void read_locations(FILE* pipe, const std::vector<const void*>& asked) {
  char function[4096], line[4096];
  size_t count = 0;
  bool settled = false;
  while (fgets(function, sizeof function, pipe)) {
    if (!strncmp(function, "0x", 2)) {
      ++count;
      settled = false;
    } else if (fgets(line, sizeof line, pipe) && count && line[0] != '?') {
      Location& location = locations[asked[count - 1]];
      location.function = name_of(function);
      const char* name = strrchr(line, '/') ? strrchr(line, '/') + 1 : line;
      if (!settled) location.line.assign(name, strcspn(name, " \n"));
      settled |= !is_wrapper(name);
    }
  }
}

}  // namespace

// Starts addr2line once for all addresses, because its start takes longer than an address.
void find_locations(const std::set<const void*>& addresses) {
  std::vector<const void*> asked;
  std::string list;
  Dl_info module{};
  for (const void* address : addresses) {
    if (locations.count(address) || !dladdr(address, &module)) continue;
    const void* offset = reinterpret_cast<void*>((char*)address - (char*)module.dli_fbase);
    locations[address].line = text(offset);
    list += " " + text(offset);
    asked.push_back(address);
  }
  if (asked.empty()) return;
  FILE* pipe = popen(text("addr2line -aifCe '", module.dli_fname, "'", list).c_str(), "r");
  read_locations(pipe, asked);
  pclose(pipe);
}

const Location& location_of(const void* address) {
  if (!locations.count(address)) find_locations({address});
  return locations[address];
}

std::string at(const void* site) { return " at " + location_of(site).line; }

}  // namespace simt
