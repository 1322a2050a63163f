#include "cuda/gpus.h"

namespace tvmf {
namespace {

constexpr int64_t kMiB = int64_t(1) << 20;

// The H200's rates were measured: a copy reaches 4.3 TB/s; the main loop of Hopper's cosines 677
// TFLOP/s, for which the L2 cache must bring 10.6 TB/s, and those of its gradients 780. A load that
// waits for another takes 0.6 us, and the smallest of the kernels 1.4 to 1.8 us with one such wait.
// Its 60 MiB of L2 cache are the driver's figure.
// Its rates of mma.sync are scaled from a measurement: a whole step of an earlier version reached
// 84 TFLOP/s (single products 60 to 109), which the instructions around mma.sync bounded. Today's
// takes 2.8 times fewer of them for a product, by count. 2.3 times the rate is counted on, because
// half as many warps share a multiprocessor.
// The rates of the other GPUs were not measured: their mma.sync rates for 16-bit and TF32 are the
// H200's scaled by multiprocessors and clock, the H100's own rates and its L2 cache's are the
// H200's, the rest is a guessed share of the data sheets' peaks.
constexpr Gpu kGpus[] = {
    {
        .name = "A100",
        .capability = 80,
        .sms = 108,
        .shared_per_block = 166912,
        .shared_per_sm = 167936,
        .l2 = 40 * kMiB,
        .hbm_rate = 1.3e12,
        .l2_rate = 3.5e12,
        .flop_rate = {140e12, 140e12, 70e12, 15e12, 8e12},
        .launch_seconds = 1e-6,
        .wait_seconds = 0.6e-6,
        .clock = 1.41e9,
    },
    {
        .name = "L40S",
        .capability = 89,
        .sms = 142,
        .shared_per_block = 101376,
        .shared_per_sm = 102400,
        .l2 = 96 * kMiB,
        .hbm_rate = 0.75e12,
        .l2_rate = 4e12,
        .flop_rate = {270e12, 270e12, 135e12, 60e12, 1e12},
        .launch_seconds = 1e-6,
        .wait_seconds = 0.6e-6,
        .clock = 2.5e9,
    },
    {
        .name = "H100",
        .capability = 90,
        .sms = 132,
        .shared_per_block = 232448,
        .shared_per_sm = 233472,
        .l2 = 50 * kMiB,
        .hbm_rate = 3.0e12,
        .l2_rate = 10.6e12,
        .flop_rate = {205e12, 205e12, 100e12, 45e12, 25e12},
        .launch_seconds = 1e-6,
        .wait_seconds = 0.6e-6,
        .clock = 1.98e9,
        .cosine_rate = 677e12,
        .product_rate = 780e12,
    },
    {
        .name = "H200",
        .capability = 90,
        .sms = 132,
        .shared_per_block = 232448,
        .shared_per_sm = 233472,
        .l2 = 60 * kMiB,
        .hbm_rate = 4.3e12,
        .l2_rate = 10.6e12,
        .flop_rate = {205e12, 205e12, 100e12, 45e12, 25e12},
        .launch_seconds = 1e-6,
        .wait_seconds = 0.6e-6,
        .clock = 1.98e9,
        .cosine_rate = 677e12,
        .product_rate = 780e12,
    },
    {
        .name = "B200",
        .capability = 100,
        .sms = 148,
        .shared_per_block = 232448,
        .shared_per_sm = 233472,
        .l2 = 126 * kMiB,
        .hbm_rate = 6.5e12,
        .l2_rate = 8e12,
        .flop_rate = {230e12, 230e12, 115e12, 50e12, 25e12},
        .launch_seconds = 1e-6,
        .wait_seconds = 0.6e-6,
        .clock = 1.85e9,
    },
};

}  // namespace

const Gpu* find_gpu(const std::string& name) {
  for (const Gpu& gpu : kGpus)
    if (name == gpu.name) return &gpu;
  return nullptr;
}

std::string gpu_names() {
  std::string names;
  for (const Gpu& gpu : kGpus) names += (names.empty() ? "" : ", ") + std::string(gpu.name);
  return names;
}

}  // namespace tvmf
