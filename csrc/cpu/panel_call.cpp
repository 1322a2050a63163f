#include "cpu/panel_call.h"

#include "cpu/isa.h"

namespace tvmf::cpu {

PanelPlan::PanelPlan(int64_t N, int64_t C, int64_t D, int64_t threads) {
  // The packed weights of a block fit the second-level cache of a core. Few classes are cut into
  // smaller blocks, so that all threads have some.
  block = C >= 896 ? 128 : C >= 512 ? 64 : C >= 256 ? 32 : 16;
  // Between two merges the threads share the gradient of a wave, of 2 MiB, and read its weights
  // twice, 8 MiB. Many threads need more blocks to share, but no more than 32 MiB of gradient.
  constexpr int64_t kGradient = int64_t(2) << 20, kWeights = int64_t(8) << 20, kMost = 4096;
  constexpr int64_t kMostGradient = int64_t(32) << 20;
  const int64_t fitting = std::min({kGradient / 4 / N, kWeights / 4 / D, kMost});
  const int64_t most = std::max(fitting, std::min(threads * block, kMostGradient / 4 / N));
  const int64_t waves = ceil_div(C, std::max(most / kClassDepth * kClassDepth, kClassDepth));
  wave = round_up(ceil_div(C, waves), kClassDepth);
}

int64_t panel_workspace(int64_t N, int64_t C, int64_t D, int64_t per_element, int64_t kept,
                        int64_t threads) {
  const PanelPlan plan(N, C, D, threads);
  const int64_t panels = ceil_div(N, kPanel), D_panels = ceil_div(D, kPanel);
  const int64_t D_elements = ceil_div(D, per_element), N_elements = ceil_div(N, per_element);
  const bool all_kept = kept >= C, pairs = per_element > 1;
  const int64_t columns = panels * D_elements * kPanel;
  const int64_t packed = ceil_div(D_elements, kPanel) * (plan.block + 1) * kPanel;
  const int64_t products = panels * plan.block * kPanel;
  const int64_t forward = columns + threads * (packed + products + plan.block * kPanel);

  const int64_t rows = D_panels * N_elements * kPanel;
  const int64_t input = D_panels * panels * kPanel * kPanel * (C > kClassesPerSum ? 2 : 1);
  // Pairs have two tiles, each of half the size.
  const int64_t tile = panels * (plan.wave + 1) * kPanel;
  const int64_t pieces = kFeaturePanels * (kClassDepth + 1) * kPanel;
  const int64_t backward = (all_kept ? 0 : columns) + rows + input + tile +
                           threads * (pieces + 3 * plan.block * kPanel + (all_kept ? 0 : packed) +
                                      (pairs ? products : 0));
  return int64_t(sizeof(float)) * std::max(forward, backward);
}

PanelCall::PanelCall(const Call<float>& call, const PanelKernels& kernels)
    : call(call),
      kernels(kernels),
      tile(panel_tile_kernels()),
      slots(torch::stable::get_num_threads()),
      plan(call.N, call.C, call.D, slots),
      panels(ceil_div(call.N, kPanel)),
      D_panels(ceil_div(call.D, kPanel)),
      D_elements(ceil_div(call.D, kernels.per_element)),
      N_elements(ceil_div(call.N, kernels.per_element)),
      input(call.head.input, call.N),
      x(input.block(0, call.N)) {}

Buffer PanelCall::columns_of_features() const {
  Buffer out(panels * D_elements * kPanel);
  run_tasks(panels, slots, [&](int64_t, int64_t p) {
    kernels.pack_columns(&x(p * kPanel, 0), x.row_stride, std::min(kPanel, call.N - p * kPanel),
                         call.D, out.data() + p * D_elements * kPanel);
  });
  return out;
}

Buffer PanelCall::rows_of_features() const {
  const int64_t distance = N_elements * kPanel, per = kernels.per_element;
  Buffer out(D_panels * distance);
  run_tasks(ceil_div(N_elements, kPanel), slots, [&](int64_t, int64_t group) {
    for (int64_t k = group * kPanel; k < std::min((group + 1) * kPanel, N_elements); ++k)
      kernels.pack_rows(&x(k * per, 0), x.row_stride, std::min(per, call.N - k * per), call.D,
                        out.data() + k * kPanel, distance);
  });
  return out;
}

void PanelCall::pack_weights(const Matrix<float>& w, float* packed) const {
  for (int64_t i = 0; i < w.rows; ++i)
    kernels.pack_row(&w(i, 0), call.D, packed + i * kPanel, packed_distance(w.rows));
}

void PanelCall::targets(int64_t begin, int64_t count, int64_t panel, int32_t* out) const {
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t n = panel * kPanel + i, c = n < call.N ? call.label[n] - begin : -1;
    out[i] = c >= 0 && c < count ? static_cast<int32_t>(c) : -1;
  }
}

void PanelCall::multiply(const float* packed, int64_t count, const Buffer& columns, int64_t begin,
                         int64_t end, float* out, int64_t out_distance) const {
  if (begin == end) return;
  kernels.multiply({.rows = count,
                    .panels = end - begin,
                    .depth = D_elements,
                    .a = packed,
                    .a_distance = packed_distance(count),
                    .b = columns.data() + begin * D_elements * kPanel,
                    .b_distance = D_elements * kPanel,
                    .out = out,
                    .out_distance = out_distance,
                    .add = false});
}

}  // namespace tvmf::cpu
