// The frame of Hopper's kernels, in which one warp copies and two warpgroups multiply, and the walk
// of a persistent block over the tiles of cosines.
#pragma once

#include "cuda/sm90/kernels.h"
#include "cuda/sm90/lanes.cuh"
#include "cuda/sm90/logits.cuh"

namespace tvmf::sm90 {

// Runs `produce` in one thread of the last warpgroup and `consume` in the two warpgroups before it,
// which take its registers.
template <class Maps, class Produce, class Consume>
__device__ __forceinline__ void produce_and_consume(const Maps& maps, const WgmmaLane& lane,
                                                    const Produce& produce,
                                                    const Consume& consume) {
  if (lane.warpgroup == kConsumers) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) {
      prefetch_map(maps.a);
      prefetch_map(maps.b);
      produce();
    }
  } else {
    take_registers<kConsumerRegisters>();
    consume();
  }
}

// The two warpgroups that multiply, which sum among themselves.
struct Consumers {
  static __device__ __forceinline__ int thread() { return threadIdx.x; }
  static __device__ __forceinline__ int threads() { return kConsumers * kWarpgroup; }
  static __device__ __forceinline__ void sync() { consumer_sync(); }
};

// A persistent block of a kernel of cosines: a block of rows, and every `stride`-th class tile.
template <class Shape>
struct CosineBlock {
  int row_block, first_row;
  int first_tile, stride, tiles;
  int steps;

  static __device__ __forceinline__ CosineBlock of(const CosineTiles& tiles, int64_t D) {
    const int row_block = int(blockIdx.x) % tiles.row_blocks;
    return {row_block,    row_block * Shape::kRows, int(blockIdx.x) / tiles.row_blocks,
            tiles.blocks, tiles.class_tiles,        int((D + kDepth - 1) / kDepth)};
  }

  // Copies all tiles; `first_class` is that of tile 0.
  __device__ __forceinline__ void copy(unsigned char* smem, typename Shape::Ring& ring,
                                       const TensorMaps& maps, int first_class) const {
    typename Shape::State state;
    for (int tile = first_tile; tile < tiles; tile += stride)
      for (int step = 0; step < steps; ++step)
        Shape::copy(smem, ring, state, maps.a, maps.b, first_class + tile * Shape::kClasses,
                    first_row, step);
  }
};

// The first row of the block that a warpgroup has, and the first class of the tile that a warp has.
template <class Shape>
__device__ __forceinline__ int warp_row_of(const WgmmaLane& lane) {
  return Shape::kSplitRows ? lane.warpgroup * Shape::kGroupRows : 0;
}
template <class Shape>
__device__ __forceinline__ int warp_class_of(int tile, const WgmmaLane& lane) {
  return tile * Shape::kClasses + (Shape::kSplitRows ? 0 : lane.warpgroup * 64) +
         lane.warp % 4 * 16;
}

// The warps that share a block's row i: `count` warps from `first` on.
template <class Shape>
struct RowWarps {
  static constexpr int kCount = Shape::kSplitRows ? kConsumerWarps / 2 : kConsumerWarps;
  static __device__ __forceinline__ int first(int i) { return i / Shape::kGroupRows * kCount; }
};

}  // namespace tvmf::sm90
