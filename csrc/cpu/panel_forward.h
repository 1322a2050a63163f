// The forward pass with products of our own. A task makes the logits of one block of classes for
// all samples, and their statistics, while they are in its core's caches.
#pragma once

#include "cpu/forward.h"
#include "cpu/panels.h"

namespace tvmf::cpu {

void panel_forward(const Call<float>& call, const PanelKernels& kernels,
                   const Statistics<float>& out);

}  // namespace tvmf::cpu
