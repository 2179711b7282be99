#pragma once

#include <cstdint>
#include <vector>

#include "ops/cpu/gradient_loops.h"
#include "ops/cpu/parallel.h"
#include "ops/gradients.h"

namespace taskgroup {

// Where the combined gradient of a parameter goes: of its shape and dtype.
struct Output {
  void* data;
  const int64_t* strides;  // [dim]; used where the parameter is `strided`
};

// outputs[t] = sum_k weights[k] g_k[t] over the tasks that have a gradient on parameter t. An
// output may be one of the gradients; it may not overlap one otherwise.
void combine(const Gradients& gradients, const double* weights,  // [K]
             const std::vector<Output>& outputs,                 // [T]
             const GradientLoops& loops, const ParallelFor& parallel_for);

}  // namespace taskgroup
