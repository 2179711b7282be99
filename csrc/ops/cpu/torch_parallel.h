#pragma once

#include <torch/csrc/stable/ops.h>

#include "ops/cpu/parallel.h"

namespace taskgroup {

// A ParallelFor over torch's own threads; n counts pieces that are each worth one.
inline void torch_parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, 1, body);
}

}  // namespace taskgroup
