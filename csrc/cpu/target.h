// The target of each row, whose cosine and logit are made apart from those of the other classes.
#pragma once

#include "cpu/call.h"

namespace tvmf::cpu {

// For each row the cosine and the logit of its target, and the target's score phi + bias before the
// margins, unless the head gives that score. They come before the blocks of classes, so that the
// rank is counted in the same pass as the other statistics.
template <class T>
void target_logits(const Call<T>& call, const Matrix<T>& x, Rows<T>& weight, const Saved<T>& saved,
                   T* score);

}  // namespace tvmf::cpu
