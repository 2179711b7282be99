#pragma once

#include <cstdint>
#include <vector>

#include "ops/cpu/gradient_loops.h"
#include "ops/cpu/parallel.h"
#include "ops/gradients.h"

namespace taskgroup {

// Receives the combined gradient of a parameter; it has the parameter's shape and dtype.
struct Output {
  void* data;
  const int64_t* strides;  // [dim]; used if the parameter is `strided`
};

// outputs[t] = sum_k weights[k] g_k[t] over the tasks that have a gradient on parameter t. An
// output may be one of the gradients, but may not overlap one in another way.
void combine(const Gradients& gradients, const double* weights,  // [K]
             const std::vector<Output>& outputs,                 // [T]
             const GradientLoops& loops, const ParallelFor& parallel_for);

}  // namespace taskgroup
