# Functions that decide whether and for which GPUs CUDA sources are compiled. They need no
# project, so that tests/test_build.py runs them in CMake's script mode.

set(tvmf_cuda_sources ${CMAKE_CURRENT_LIST_DIR}/../csrc/cuda)

# Finds nvcc and compiles an empty program with it, because a compiler may be there and still fail,
# for example where it does not support the C++ compiler. Sets `nvcc` to its path, or to "" and
# `problem` to the reason.
function(tvmf_find_nvcc nvcc problem)
  set(${nvcc} "" PARENT_SCOPE)
  set(${problem} "" PARENT_SCOPE)
  separate_arguments(command UNIX_COMMAND "$ENV{CUDACXX}")  # it may hold flags
  if(NOT command)
    set(folders)
    foreach(variable CUDA_HOME CUDA_PATH)
      if(NOT "$ENV{${variable}}" STREQUAL "")
        list(APPEND folders "$ENV{${variable}}/bin")
      endif()
    endforeach()
    find_program(found nvcc HINTS ${folders} NO_CACHE)
    if(NOT found)
      set(${problem} "no nvcc was found; put it on PATH, or set CUDA_HOME or CUDACXX" PARENT_SCOPE)
      return()
    endif()
    set(command "${found}")
  endif()
  list(GET command 0 program)
  set(host_compiler "")
  if(NOT "$ENV{CUDAHOSTCXX}" STREQUAL "")
    set(host_compiler -ccbin "$ENV{CUDAHOSTCXX}")
  endif()
  set(probe "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/tvmf_nvcc_probe")
  file(WRITE "${probe}.cu" "int main() { return 0; }\n")
  separate_arguments(flags UNIX_COMMAND "$ENV{CUDAFLAGS}")
  execute_process(
    COMMAND ${command} ${host_compiler} ${flags} -std=c++20 -c "${probe}.cu" -o "${probe}.o"
    RESULT_VARIABLE status OUTPUT_VARIABLE printed ERROR_VARIABLE printed)
  if(status EQUAL 0)
    set(${nvcc} "${program}" PARENT_SCOPE)
    return()
  endif()
  # The last line that names an error says more than the last line, which may be a row of carets.
  string(REPLACE ";" "," printed "${printed}")
  string(REGEX MATCHALL "[^\n]*[^ \t\n][^\n]*" lines "${printed}")
  set(errors ${lines})
  list(FILTER errors INCLUDE REGEX "(error|fatal) *:")
  if(errors)
    set(lines ${errors})
  endif()
  if(lines)
    list(GET lines -1 last)
    string(STRIP "${last}" last)
    set(said "and printed '${last}'")
  else()
    set(said "and printed nothing")
  endif()
  if(NOT status MATCHES "^[0-9]+$" AND NOT lines)
    set(${problem} "${program} does not run: ${status}" PARENT_SCOPE)
  else()
    set(${problem} "${program} does not compile an empty program: it ended with ${status} ${said}"
      PARENT_SCOPE)
  endif()
endfunction()

# Sets `capabilities` to those of the GPUs here that are newer than 9.0 and in nvcc's list of what it
# supports. Without code of their own, their first call compiles PTX for a minute or two. GPUs below
# 9.0 run the code for 8.0.
function(tvmf_newer_gpus capabilities supported)
  set(found)
  find_program(smi nvidia-smi NO_CACHE)
  if(smi)
    execute_process(COMMAND "${smi}" --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE printed ERROR_QUIET TIMEOUT 20)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" printed "${printed}")
    foreach(capability IN LISTS printed)
      string(REPLACE "." "" plain ${capability})
      if(plain GREATER 90 AND supported MATCHES "compute_${plain}[^0-9]")
        list(APPEND found ${capability})
      endif()
    endforeach()
  endif()
  set(${capabilities} "${found}" PARENT_SCOPE)
endfunction()

# Reads TORCH_CUDA_ARCH_LIST as torch does, such as "8.0;9.0+PTX", and sets `archs` to a value for
# CMAKE_CUDA_ARCHITECTURES. Three rules differ from torch's:
# - A capability that has a folder of kernels of its own, such as csrc/cuda/sm90, is compiled as its
#   "a" target, 9.0a: every GPU of that capability runs it, and it alone has the chip's own
#   instructions. A second binary for the plain target might be chosen in its place. The portable
#   kernels of sm80 need no such target.
# - PTX is always of the plain target: newer GPUs cannot load PTX of an "a" or "f" target.
# - Capabilities below 8.0, which the kernels do not support, are left out.
function(tvmf_cuda_archs archs nvcc)
  string(REGEX MATCHALL "[^ ;,]+" requested "$ENV{TORCH_CUDA_ARCH_LIST}")
  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE supported ERROR_QUIET)
  if(NOT requested)
    set(requested 8.0 9.0+PTX)
    tvmf_newer_gpus(newer "${supported}")
    list(APPEND requested ${newer})
  endif()
  set(values)
  set(left_out)
  foreach(entry IN LISTS requested)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: got '${entry}', "
        "wanted compute capabilities such as 8.0 or 9.0+PTX")
    endif()
    set(plain ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
    set(variant "${CMAKE_MATCH_3}")
    set(ptx "${CMAKE_MATCH_4}")
    if(CMAKE_MATCH_1 LESS 8)
      list(APPEND left_out ${entry})
      continue()
    endif()
    if(supported AND NOT supported MATCHES "compute_${plain}[^0-9]")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: got '${entry}', for which ${nvcc} cannot compile; "
        "leave it out, or use a newer CUDA toolkit")
    endif()
    if(plain GREATER 80 AND IS_DIRECTORY ${tvmf_cuda_sources}/sm${plain})
      set(variant a)
    endif()
    list(APPEND values ${plain}${variant}-real)
    if(ptx)
      list(APPEND values ${plain}-virtual)
    endif()
  endforeach()
  if(NOT values)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: got '$ENV{TORCH_CUDA_ARCH_LIST}', "
      "wanted at least one compute capability of 8.0 or newer")
  endif()
  if(left_out)
    list(JOIN left_out ", " left_out)
    message(STATUS "tvmf_ext: ${left_out} of TORCH_CUDA_ARCH_LIST is left out, "
      "because the kernels need compute capability 8.0 or newer")
  endif()
  list(REMOVE_DUPLICATES values)
  set(${archs} "${values}" PARENT_SCOPE)
endfunction()
