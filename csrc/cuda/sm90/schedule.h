// How the persistent blocks of one launch share the tiles of a chunk's two products: that with the
// features gives tiles of dw, that with the weights gives tiles of dx.
#pragma once

#include <cstdint>

#include "similarity.h"

namespace tvmf::sm90 {

// The tiles of a product of kProductRows x kProductCols, and the steps of kDepth of each.
struct ProductTiles {
  int rows, cols;
  int steps;

  TVMF_HOST_DEVICE int64_t count() const { return int64_t(rows) * cols; }
};

struct Range {
  int begin, end;
};

// One product is shared out evenly, in whole tiles: a block has as many of them as any other, or
// one more. The other one fills up: it gives `few` units to a block that has one more, and `many`
// to the others. A unit of dw is a tile. A unit of dx is a tile where `whole`, and else a step of
// one: so several blocks make parts of a tile, each of which has a partial dx of its own.
struct ProductSchedule {
  ProductTiles weight, features;
  int blocks;
  bool whole;
  int few, many;

  TVMF_HOST_DEVICE Range weight_tiles(int block) const {
    return whole ? filling(block, weight.count()) : even(block, weight.count());
  }
  // Steps of the tiles of dx, counted from the first one's.
  TVMF_HOST_DEVICE Range feature_steps(int block) const {
    if (!whole) return filling(block, features.count() * features.steps);
    const Range tiles = even(block, features.count());
    return {tiles.begin * features.steps, tiles.end * features.steps};
  }
  // The block that begins the tile of dx of which `block` makes a part.
  TVMF_HOST_DEVICE int first_block(int block, int tile) const {
    while (block > 0 && feature_steps(block - 1).end > tile * features.steps) --block;
    return block;
  }
  // A number for each block, such that the blocks which make a tile of dx have successive ones.
  TVMF_HOST_DEVICE int turn(int block) const { return few > 0 ? block : block - longer(block); }

 private:
  TVMF_HOST_DEVICE int share(int block, int64_t count) const { return int(count * block / blocks); }
  TVMF_HOST_DEVICE Range even(int block, int64_t count) const {
    return {share(block, count), share(block + 1, count)};
  }
  // The blocks before this one that have one tile more of the product that is shared out evenly.
  TVMF_HOST_DEVICE int longer(int block) const {
    const int64_t count = whole ? features.count() : weight.count();
    return share(block, count) - int(count / blocks) * block;
  }
  TVMF_HOST_DEVICE int filled(int block, int64_t count) const {
    const int64_t units = int64_t(block - longer(block)) * many + int64_t(longer(block)) * few;
    return int(units < count ? units : count);
  }
  TVMF_HOST_DEVICE Range filling(int block, int64_t count) const {
    return {filled(block, count), filled(block + 1, count)};
  }
};

// What a schedule comes to.
struct ScheduleLoad {
  int64_t partials;  // partial sums of dx
  int64_t parts;     // parts of tiles of dx that blocks make
  // Of the block that takes longest: its steps, and the tiles and parts of tiles that it ends.
  int steps, tiles;
};

// The schedule of a chunk of so many classes on `sms` multiprocessors, with the fewest steps in the
// block that has most, and with at most `most_partials` partial sums of dx.
ProductSchedule make_schedule(int64_t rows, int64_t features, int64_t classes, int64_t sms,
                              int64_t most_partials);
ScheduleLoad load_of(const ProductSchedule& schedule);

}  // namespace tvmf::sm90
