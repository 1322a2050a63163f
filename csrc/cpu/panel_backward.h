// The backward pass with products of our own. Blocks of classes make their gradient tile and from
// it their weight gradient; then the features' gradient takes the tiles of a whole wave of blocks,
// cut by features, so that no thread needs a sum of its own.
#pragma once

#include "cpu/backward.h"
#include "cpu/panels.h"

namespace tvmf::cpu {

// Fills the gradients that are wanted, those but the weight's in float32.
void panel_backward(const Call<float>& call, const PanelKernels& kernels,
                    const Saved<const float>& saved, const Upstream<float>& upstream,
                    int64_t wanted, const Gradients& out);

}  // namespace tvmf::cpu
