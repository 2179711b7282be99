#pragma once

#include <cstdint>
#include <functional>

#include "ops/cpu/gradient_loops.h"
#include "ops/cpu/parallel.h"
#include "ops/gradients.h"

namespace taskgroup {

// Calls result(i, j, <g_i, g_j>) for every pair i <= j of tasks, from one thread. g_k is the
// gradient of task k on all parameters; missing gradients are zero.
//
// Reads each gradient once for every 64 tasks, without copying it. The sums do not depend on the
// number of threads: the parts depend on the sizes alone, and are added in a fixed order.
void gram(const Gradients& gradients, const GradientLoops& loops, const ParallelFor& parallel_for,
          const std::function<void(int64_t i, int64_t j, double product)>& result);

}  // namespace taskgroup
