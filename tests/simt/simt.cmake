# The emulator's Python modules. simt_hooks checks and counts every access to memory; simt_asan runs
# the same kernels under AddressSanitizer and UBSan. simt_torch has the host code that calls them
# from torch's tensors. tests/simt/__init__.py builds all three.
execute_process(
  COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(pybind11 CONFIG REQUIRED)

# tests/simt/cuda holds the emulator's versions of some files of csrc/cuda, under the same names. Its
# headers come first by include path. A .cpp file there replaces the .cu file of its name.
file(GLOB replacements CONFIGURE_DEPENDS tests/simt/cuda/sm*/*.cpp)
file(GLOB faults CONFIGURE_DEPENDS tests/simt/faults*.cu)
set(kernels ${cuda_kernel_files} ${faults})
foreach(file IN LISTS replacements)
  string(REPLACE ${CMAKE_SOURCE_DIR}/tests/simt/cuda/ ${CMAKE_SOURCE_DIR}/csrc/cuda/ file ${file})
  string(REGEX REPLACE "cpp$" "cu" file ${file})
  list(REMOVE_ITEM kernels ${file})
endforeach()
set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX)
file(GLOB runtime CONFIGURE_DEPENDS tests/simt/runtime/*.cpp)
include_directories(tests/simt csrc)
add_compile_options(-ffp-contract=off -Wall -Wextra -Wno-psabi)

# nvcc includes cuda_runtime.h before a kernel's file. The other options keep accesses to memory as
# they are written: GCC would vectorise and merge them, or call memcpy, which has no hook. A tail
# call would hide its line, and a guarded static variable calls functions of TSan's runtime.
set(kernel_options -x c++ -include cuda_runtime.h -g1 -fno-tree-vectorize -fno-tree-slp-vectorize
  -fno-store-merging -fno-tree-loop-distribute-patterns -fno-optimize-sibling-calls
  -fno-threadsafe-statics -Wno-unknown-pragmas)
set(hooks_kernels -O2 -fsanitize=thread --param=tsan-instrument-func-entry-exit=0)
set(hooks_runtime -O3)
set(asan_kernels -Og -fsanitize=address,undefined -fno-sanitize-recover=all)
set(asan_runtime -O2 -g1 -fsanitize=address)

# The files that are the same in both modules are compiled once.
add_library(simt_common OBJECT ${cuda_plan_files} ${replacements} csrc/cuda/dispatch.cpp
  tests/simt/bind_runtime.cpp)
target_link_libraries(simt_common PRIVATE pybind11::module)
target_compile_options(simt_common PRIVATE -O1)

foreach(kind hooks asan)
  add_library(simt_${kind}_kernels OBJECT ${kernels})
  add_library(simt_${kind}_runtime OBJECT ${runtime})
  target_compile_options(simt_${kind}_kernels PRIVATE ${kernel_options} ${${kind}_kernels})
  target_compile_options(simt_${kind}_runtime PRIVATE ${${kind}_runtime})
  # One unit of all files, so that a hook has no calls between them.
  set_target_properties(simt_${kind}_runtime PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
  pybind11_add_module(simt_${kind} NO_EXTRAS tests/simt/bind.cpp $<TARGET_OBJECTS:simt_common>
    $<TARGET_OBJECTS:simt_${kind}_kernels> $<TARGET_OBJECTS:simt_${kind}_runtime>)
  target_compile_options(simt_${kind} PRIVATE -O1)
  target_compile_definitions(simt_${kind} PRIVATE SIMT_MODULE=simt_${kind})
endforeach()
# The hooks are the runtime's own, so libtsan is not linked.
target_link_options(simt_asan PRIVATE -fsanitize=address,undefined)

# The first two modules see nothing of torch. Calls of torch's functions that bind_torch.cpp
# replaces must not go to torch.
pybind11_add_module(simt_torch NO_EXTRAS tests/simt/bind_torch.cpp csrc/torch/cuda_call.cpp
  $<TARGET_OBJECTS:simt_common> $<TARGET_OBJECTS:simt_hooks_kernels>
  $<TARGET_OBJECTS:simt_hooks_runtime>)
target_compile_options(simt_torch PRIVATE -O1)
target_compile_definitions(simt_torch PRIVATE TORCH_TARGET_VERSION=${TVMF_TORCH_TARGET})
target_include_directories(simt_torch SYSTEM PRIVATE ${TVMF_TORCH_DIR}/include)
target_link_libraries(simt_torch PRIVATE ${TVMF_TORCH_DIR}/lib/libtorch.so)
target_link_options(simt_torch PRIVATE -Wl,-Bsymbolic -Wl,--no-as-needed)
