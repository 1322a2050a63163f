// Python's way to the emulator: options, reports, and the emulator's own test kernels.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "faults.h"
#include "simt.h"

namespace py = pybind11;

void bind_runtime(py::module_& module) {
  using namespace py::literals;
  module.def(
      "configure",
      [](uint64_t seed, bool check_races, bool count) {
        simt::configure({seed, check_races, count});
      },
      "seed"_a = 0, "check_races"_a = true, "count"_a = true);
  module.def("reset", simt::reset);
  module.def("reports", simt::reports);
#define FIELD(name) .def_readonly(#name, &simt::SiteReport::name)
  py::class_<simt::SiteReport>(module, "SiteReport") FIELD(where) FIELD(kind) FIELD(requests)
      FIELD(bytes) FIELD(sectors) FIELD(wavefronts) FIELD(conflicts);
#undef FIELD
#define FIELD(name) .def_readonly(#name, &simt::LaunchReport::name)
  py::class_<simt::LaunchReport>(module, "LaunchReport")
      .def_property_readonly("grid",
                             [](const simt::LaunchReport& r) {
                               return std::array<unsigned, 3>{r.grid.x, r.grid.y, r.grid.z};
                             }) FIELD(kernel) FIELD(threads) FIELD(shared_bytes)
          FIELD(global_read_bytes) FIELD(global_write_bytes) FIELD(global_read_sectors)
              FIELD(global_write_sectors) FIELD(global_unique_read_sectors)
                  FIELD(global_unique_write_sectors) FIELD(shared_wavefronts) FIELD(bank_conflicts)
                      FIELD(mma) FIELD(load_matrix) FIELD(barriers) FIELD(atomics) FIELD(sites);
#undef FIELD
}

// y [outputs] of the kernel on the bytes of x; buffers "x" and "y" have these exact extents.
static py::array_t<float> run_fault(const std::string& name, py::array x, int outputs, bool right,
                                    int argument, unsigned grid, int threads, int shared_bytes) {
  simt::release_all();
  faults::Case c{simt::allocate("x", x.nbytes()),
                 static_cast<float*>(simt::allocate("y", outputs * sizeof(float))), int(x.nbytes()),
                 argument, right};
  std::memcpy(const_cast<void*>(c.x), x.data(), x.nbytes());
  faults::launch(name, grid, threads, shared_bytes, c);
  py::array_t<float> y(outputs);
  std::memcpy(y.mutable_data(), c.y, y.nbytes());
  return y;
}

void bind_faults(py::module_& module) {
  using namespace py::literals;
  module.def("run_fault", run_fault, "name"_a, "x"_a, "outputs"_a, "right"_a = true,
             "argument"_a = 0, "grid"_a = 1, "threads"_a = 32, "shared_bytes"_a = 0);
}
