// Stores the 16-bit weights that CosineShape::multiply has in its registers.
#pragma once

#include "cuda/sm90/mainloop.cuh"

namespace tvmf::sm90 {

// The weights of a lane's two classes, half a step at a time.
struct StoreWeights {
  uint16_t* to;    // the first class's row
  int64_t stride;  // of `to`
  int first;       // the lane's first column of 32
  bool inside[2];  // whether the classes exist
  bool wanted;

  // `convert(pair, h)` is what is stored of a pair of class h.
  template <class F>
  __device__ __forceinline__ void store(int step, int half, const uint32_t* pairs,
                                        const F& convert) const {
    const int64_t d = step * kDepth + half * 32 + first;
    if (d >= stride) return;
    struct alignas(16) Four {
      uint32_t v[4];
    };
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (inside[h])
        store_as(to + h * 8 * stride + d, Four{convert(pairs[h], h), convert(pairs[2 + h], h),
                                               convert(pairs[4 + h], h), convert(pairs[6 + h], h)});
  }
  __device__ __forceinline__ void operator()(int step, int half, const uint32_t* pairs) const {
    store(step, half, pairs, [](uint32_t pair, int) { return pair; });
  }
};

// The same as unit rows.
template <Math kMath, class Shape>
struct StoreUnitRows {
  StoreWeights rows;
  float unit[2];
  bool wanted;

  __device__ __forceinline__ void operator()(int step, int half, const uint32_t* pairs) const {
    rows.store(step, half, pairs, [&](uint32_t pair, int h) {
      if constexpr (kMath == Math::kBf16)
        return scale_bf16(pair, to_bf16(unit[h]));
      else if constexpr (Shape::kNarrow)
        return pack_f16(half_of<kMath>(pair, 0) * unit[h], half_of<kMath>(pair, 1) * unit[h]);
      else
        return pair;
    });
  }
};

}  // namespace tvmf::sm90
