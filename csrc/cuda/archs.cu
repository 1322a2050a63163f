#include "cuda/archs.h"

#define TVMF_TEXT(...) #__VA_ARGS__
#define TVMF_EXPAND(...) TVMF_TEXT(__VA_ARGS__)

namespace tvmf {

const char* cuda_archs() { return TVMF_EXPAND(__CUDA_ARCH_LIST__); }

}  // namespace tvmf
