// The fields of a plan by name, for Python and for the emulator. The names are those of the classes
// of tvmf_ext/planning.py.
#pragma once

#include <string>

#include "cuda/plan.h"

namespace tvmf {

inline const char* name_of(Math math) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "TF32", "float32", "float64"};
  return kNames[int(math)];
}

template <class Put>
void put_pass(const std::string& pass, const PassCost& cost, const Put& put) {
  put(pass + "_launches", cost.launches);
  put(pass + "_workspace", cost.workspace);
  put(pass + "_flops", cost.flops);
  put(pass + "_hbm", cost.hbm);
  put(pass + "_l2", cost.l2);
  put(pass + "_seconds", cost.seconds);
}

// An architecture's own fields. A new architecture adds a function here.
template <class Put>
void put_variant(const sm80::Plan& plan, const Put& put) {
  put("architecture", std::string("sm80"));
  put("kept", plan.kept);
  put("latency", plan.latency);
  put("tile", plan.tile);
  put("row_tiles", plan.row_tiles);
  put("class_splits", plan.class_splits);
  put("tiles_per_split", plan.tiles_per_split);
  put("chunk", plan.chunk);
  put("chunks", plan.chunks);
  put("resident", plan.resident);
  put("row_groups", plan.row_groups);
  put("feature_splits", plan.feature_splits);
  put("input_tile", plan.input_tile);
  put("input_splits", plan.input_splits);
}

template <class Put>
void put_variant(const sm90::Plan& plan, const Put& put) {
  put("architecture", std::string("sm90"));
  put("kept", int64_t(0));
  put("tile_rows", int64_t(sm90::kCosineRows));
  put("tile_classes", plan.tile_classes());
  put("row_blocks", plan.row_blocks);
  put("class_tiles", plan.class_tiles);
  put("statistics_blocks", plan.statistics_blocks);
  put("gradient_blocks", plan.gradient_blocks);
  put("product_blocks", plan.blocks);
  put("chunk", plan.chunk);
  put("chunks", plan.chunks);
  put("product_rows", int64_t(sm90::kProductRows));
  put("product_cols", int64_t(sm90::kProductCols));
  put("input_splits", plan.input_splits);
}

// Calls put(name, value) with every field.
template <class Put>
void put_fields(const CudaPlan& plan, const Put& put) {
  put("math", std::string(name_of(plan.problem.math())));
  put("saved", plan.cost.saved);
  put("l2_rate", plan.cost.l2_rate);
  put("flop_rate", plan.cost.flop_rate);
  put_pass("forward", plan.cost.forward, put);
  put_pass("backward", plan.cost.backward, put);
  std::visit([&](const auto& variant) { put_variant(variant, put); }, plan.variant);
}

}  // namespace tvmf
