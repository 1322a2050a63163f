#include "cuda/sm90/schedule.h"

#include <algorithm>

#include "cuda/sm90/plan.h"

namespace tvmf::sm90 {
namespace {

// The end of a tile, in which a block makes no products, takes about as long as so many steps.
constexpr int kEnd = 3;
// A part of a tile of dx has at least so many steps.
constexpr int kLeast = 4;
// Partial sums take memory: tiles are not cut for less than this gain.
constexpr double kWorthwhile = 1.03;

// Fills `few` and `many` so that the longest block is as short as they can make it.
void fill(ProductSchedule& schedule) {
  const ProductTiles &weight = schedule.weight, &features = schedule.features;
  const ProductTiles& even = schedule.whole ? features : weight;
  const int64_t each = even.count() / schedule.blocks, longer = even.count() % schedule.blocks;
  const int64_t tile = even.steps + kEnd, unit = schedule.whole ? weight.steps + kEnd : 1;
  const int64_t units = schedule.whole ? weight.count() : features.count() * features.steps;
  const auto fitting = [&](int64_t steps, int64_t tiles) {
    const int64_t left = std::max<int64_t>(steps - tiles * tile, 0) / unit;
    return !schedule.whole && left < kLeast ? 0 : left;
  };
  int64_t below = 0, enough = (each + 1) * tile + (units + kLeast) * unit;
  while (enough - below > 1) {
    const int64_t steps = (below + enough) / 2;
    const int64_t room =
        (schedule.blocks - longer) * fitting(steps, each) + longer * fitting(steps, each + 1);
    (room < units ? below : enough) = steps;
  }
  schedule.many = int(std::min(fitting(enough, each), units));
  schedule.few = longer > 0 ? int(std::min(fitting(enough, each + 1), units)) : schedule.many;
}

int64_t steps_and_ends(const ScheduleLoad& load) { return load.steps + kEnd * load.tiles; }

}  // namespace

ScheduleLoad load_of(const ProductSchedule& schedule) {
  ScheduleLoad load{};
  const int of_features = schedule.features.steps;
  int64_t parts = 0;  // of the tile of dx that the block before has begun
  for (int block = 0; block < schedule.blocks; ++block) {
    const Range weight = schedule.weight_tiles(block), features = schedule.feature_steps(block);
    ScheduleLoad own{};
    own.tiles = weight.end - weight.begin;
    own.steps = own.tiles * schedule.weight.steps + features.end - features.begin;
    for (int step = features.begin; step < features.end;) {
      if (step % of_features == 0) parts = 0;
      step = std::min((step / of_features + 1) * of_features, features.end);
      ++own.tiles, ++load.parts, ++parts;
      load.partials = std::max(load.partials, parts);
    }
    if (steps_and_ends(own) > steps_and_ends(load)) load.steps = own.steps, load.tiles = own.tiles;
  }
  return load;
}

ProductSchedule make_schedule(int64_t rows, int64_t features, int64_t classes, int64_t sms,
                              int64_t most_partials) {
  const int cols = int(ceil_div(features, kProductCols));
  ProductSchedule cut{};
  cut.weight = {int(ceil_div(classes, kProductRows)), cols, int(ceil_div(rows, kDepth))};
  cut.features = {int(ceil_div(rows, kProductRows)), cols, int(ceil_div(classes, kDepth))};
  const int64_t parts = cut.features.count() * ceil_div(cut.features.steps, kLeast);
  cut.blocks = int(std::min(sms, cut.weight.count() + parts));
  ProductSchedule whole = cut;
  whole.whole = true;
  fill(whole);
  if (most_partials < 2) return whole;
  fill(cut);
  const ScheduleLoad load = load_of(cut);
  const bool worthwhile =
      double(steps_and_ends(load)) * kWorthwhile < double(steps_and_ends(load_of(whole)));
  return load.partials <= most_partials && worthwhile ? cut : whole;
}

}  // namespace tvmf::sm90
