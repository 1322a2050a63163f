// The order in which a block copies, rounds and multiplies the stages of its tiles, so that copies
// are under way while it works.
#pragma once

#include <type_traits>

#include "cuda/ptx.cuh"

namespace tvmf::sm80 {

// A place in the sequence of steps, and its stage.
struct Cursor {
  int tile = 0, step = 0, stage = 0;

  template <int kStages>
  __device__ __forceinline__ void advance(int steps) {
    if (++step == steps) step = 0, ++tile;
    if (++stage == kStages) stage = 0;
  }
};

// What a caller has to do at none of the pipeline's steps.
struct Nothing {
  template <class... Arguments>
  __device__ __forceinline__ void operator()(Arguments...) const {}
};

// Runs `tiles` tiles of `steps` stages each without draining the pipeline between them: the next
// tile's loads are under way while `finish` works on the last one's products.
//   load_a, load_b(tile, step, stage)  start the copies
//   start(tile)                        first step's data have arrived
//   round(tile, step, stage)           rounds the right operand, which has arrived
//   multiply(step, stage)              a stage's products
//   finish(tile)                       all products are there
// Where there is a `round`, it works a step ahead of `multiply`, and what it writes for one stage
// is read while it writes for the other. With no steps, `finish` alone works on the tiles.
template <int kStages, class LoadA, class LoadB, class Start, class Round, class Multiply,
          class Finish>
__device__ __forceinline__ void pipeline(int tiles, int steps, const LoadA& load_a,
                                         const LoadB& load_b, const Start& start,
                                         const Round& round, const Multiply& multiply,
                                         const Finish& finish) {
  constexpr bool kRound = !std::is_same_v<Round, Nothing>;
  static_assert(!kRound || kStages == 2);
  // No stage may be written while a warp still reads what the last pipeline left there.
  __syncthreads();
  Cursor a, b;
  const auto prefetch_a = [&] {
    if (steps == 0 || a.tile >= tiles) return;
    load_a(a.tile, a.step, a.stage);
    a.advance<kStages>(steps);
  };
  const auto prefetch_b = [&] {
    if (steps == 0 || b.tile >= tiles) return;
    load_b(b.tile, b.step, b.stage);
    b.advance<kStages>(steps);
  };
  const auto prefetch = [&] {
    prefetch_a();
    prefetch_b();
    cp_async_commit();
  };
  if constexpr (kRound) {
    prefetch_b();
    cp_async_commit();
  }
  for (int i = 0; i < kStages - 1; ++i) prefetch();
  if constexpr (kRound) {
    cp_async_wait<kStages - 1>();
    __syncthreads();
    if (steps > 0 && tiles > 0) round(0, 0, 0);
  }
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    for (int step = 0; step < steps; ++step) {
      // The oldest stage has arrived, and the one before it has been read by all.
      cp_async_wait<kStages - 2>();
      __syncthreads();
      prefetch();
      if (step == 0) start(tile);
      multiply(step, stage);
      if (++stage == kStages) stage = 0;
      if (kRound && step + 1 < steps) round(tile, step + 1, stage);
    }
    finish(tile);
    if (kRound && steps > 0 && tile + 1 < tiles) round(tile + 1, 0, stage);
  }
  cp_async_wait<0>();
}

}  // namespace tvmf::sm80
