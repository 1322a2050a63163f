// Compiles the shared mathematics for every requested GPU architecture and reports which they are.
#include "similarity.h"

namespace tvmf {

template __device__ float similarity<float>(float, float);
template __device__ double similarity<double>(double, double);

#define TVMF_TEXT(...) #__VA_ARGS__
#define TVMF_EXPAND(...) TVMF_TEXT(__VA_ARGS__)

// "800,900": __CUDA_ARCH_LIST__, what nvcc was really asked for.
const char* cuda_archs() { return TVMF_EXPAND(__CUDA_ARCH_LIST__); }

}  // namespace tvmf
