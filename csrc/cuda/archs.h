// The compute capabilities that this build has code for.
#pragma once

namespace tvmf {

// As nvcc was asked for them: "800,900" for 8.0 and 9.0.
const char* cuda_archs();

}  // namespace tvmf
