// The instructions of AMX that our products need. A tile has at most 16 rows of at most 64 bytes;
// the processor has eight tiles, which a template argument names. The tests put an emulation in the
// place of this file, by include path.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "cpu/amx_shapes.h"

namespace tvmf::cpu::amx {

// Whether the processor has AMX with bfloat16, and Linux lets this process use it. It must be asked
// once, because tiles make the memory larger that saves an interrupted thread.
inline bool available() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBf16) && (edx & kTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// These are assembly because the compiler's own versions take a tile's number as text, and those of
// GCC 12 do not say that a load reads memory.
inline void configure(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
}
inline void release() { asm volatile("tilerelease" ::: "memory"); }

template <int kTile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// `stride` is the distance of two rows in bytes.
template <int kTile>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
// sum += a b: a row of `a` and a column of `b` have pairs of bfloat16, and `sum` has float32.
template <int kSum, int kA, int kB>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace tvmf::cpu::amx
