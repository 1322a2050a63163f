// Python's functions for the emulator itself: options, reports, and the kernels that test it.
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
      [](uint64_t seed, bool check_races, bool count, bool execute) {
        simt::configure({seed, check_races, count, execute});
      },
      "seed"_a = 0, "check_races"_a = true, "count"_a = true, "execute"_a = true);
  module.def("calls", [] {
    const simt::Calls calls = simt::calls();
    return std::map<std::string, uint64_t>{{"launches", calls.launches},
                                           {"maps", calls.maps},
                                           {"attributes_set", calls.attributes_set},
                                           {"attributes_read", calls.attributes_read}};
  });
  module.def("reset", simt::reset);
  module.def("reports", simt::reports);
#define FIELD(name) .def_readonly(#name, &simt::SiteReport::name)
  // A process can load two of the emulator's modules, each with its own report types.
  py::class_<simt::SiteReport>(module, "SiteReport", py::module_local()) FIELD(where) FIELD(kind)
      FIELD(requests) FIELD(bytes) FIELD(sectors) FIELD(wavefronts) FIELD(conflicts);
#undef FIELD
#define FIELD(name) .def_readonly(#name, &simt::LaunchReport::name)
  py::class_<simt::LaunchReport>(module, "LaunchReport", py::module_local())
      .def_property_readonly("grid",
                             [](const simt::LaunchReport& r) {
                               return std::array<unsigned, 3>{r.grid.x, r.grid.y, r.grid.z};
                             }) FIELD(kernel) FIELD(threads) FIELD(shared_bytes)
          FIELD(global_read_bytes) FIELD(global_write_bytes) FIELD(global_read_sectors)
              FIELD(global_write_sectors) FIELD(global_unique_read_sectors)
                  FIELD(global_unique_write_sectors) FIELD(shared_wavefronts) FIELD(bank_conflicts)
                      FIELD(mma) FIELD(load_matrix) FIELD(barriers) FIELD(atomics) FIELD(wgmma)
                          FIELD(tensor_copies) FIELD(tensor_copy_bytes) FIELD(sites);
#undef FIELD
}

// Runs a kernel of faults.cu on the bytes of x, and returns y. The buffers are named "x" and "y".
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

static faults::Matrix matrix(const char* name, const py::array& array, int box_rows, int box_cols) {
  if (!array.ndim()) return {};
  const int64_t size = array.itemsize(), rows = array.shape(0), cols = array.shape(1);
  const int64_t row_stride = array.strides(0) / size;
  const size_t bytes = ((rows - 1) * row_stride + cols) * size;  // up to the last element
  void* memory = simt::allocate(name, bytes);
  std::memcpy(memory, array.data(), bytes);
  return {
      memory, int(size), rows, cols, row_stride, box_rows, box_cols ? box_cols : int(128 / size)};
}

// Runs a kernel of faults_sm90.cu, which copies boxes of the buffers "a" and "b".
static py::array_t<float> run_fault_sm90(const std::string& name, py::array a, py::array b,
                                         int outputs, int box_a, int box_b, bool right,
                                         std::array<int, 4> argument, unsigned grid, int threads,
                                         int shared_bytes, int box_cols) {
  simt::release_all();
  faults::CaseSm90 c{matrix("a", a, box_a, box_cols),
                     matrix("b", b, box_b, box_cols),
                     static_cast<float*>(simt::allocate("y", outputs * sizeof(float))),
                     {},
                     right};
  std::copy(argument.begin(), argument.end(), c.argument);
  faults::launch_sm90(name, grid, threads, shared_bytes, c);
  py::array_t<float> y(outputs);
  std::memcpy(y.mutable_data(), c.y, y.nbytes());
  return y;
}

void bind_faults(py::module_& module) {
  using namespace py::literals;
  module.def("run_fault", run_fault, "name"_a, "x"_a, "outputs"_a, "right"_a = true,
             "argument"_a = 0, "grid"_a = 1, "threads"_a = 32, "shared_bytes"_a = 0);
  module.def("run_fault_sm90", run_fault_sm90, "name"_a, "a"_a, "b"_a, "outputs"_a, "box_a"_a = 64,
             "box_b"_a = 64, "right"_a = true, "argument"_a = std::array<int, 4>{}, "grid"_a = 1,
             "threads"_a = 128, "shared_bytes"_a = 0, "box_cols"_a = 0);
}
