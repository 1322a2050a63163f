// The compute capabilities that this build has code for.
#pragma once

namespace tvmf {

// The list that nvcc was given: "800,900" for 8.0 and 9.0.
const char* cuda_archs();

}  // namespace tvmf
