#pragma once

// What CUDA C++ has no portable words for, each behind one small function, so that the kernels also
// compile as plain C++: tests/csrc/cuda_shim.h has the same functions for the host.

#include <cstdint>

#ifndef __CUDACC__
#include "cuda_shim.h"
#else

namespace taskgroup {

// As CUDA's own, and never fused with one another.
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }

}  // namespace taskgroup

#endif
