// What Python asks about plans, without a call of the kernels.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "cuda/gpus.h"

namespace tvmf {

// The fields of a plan as "key=value;...". A field that belongs to one architecture appears with
// that architecture alone; `architecture` is "cpu", "sm80" or "sm90". Throws std::invalid_argument
// for a size below 1, an unknown dtype or an unknown device.
std::string plan_text(int64_t N, int64_t C, int64_t D, std::string dtype, std::string weight_dtype,
                      bool allow_tf32, int64_t kept, bool with_sum, std::string device);

// What the kernels that serve such a head on `device` ("cuda:0", or the name of a GPU) keep of its
// products, as the members of KeptProducts (cuda/cost.h). Strides are in elements.
std::tuple<int64_t, int64_t, int64_t> kept_products(int64_t C, int64_t D, std::string dtype,
                                                    std::string weight_dtype, int64_t row_stride,
                                                    int64_t col_stride, bool aligned,
                                                    std::string device);

// The description of a device of this machine, in builds with CUDA (cuda_call.cpp). Throws for one
// on which the kernels do not run.
const Gpu& cuda_gpu(int32_t device);

}  // namespace tvmf
