#pragma once

#include <torch/csrc/stable/ops.h>

#include "ops/cpu/parallel.h"

namespace taskgroup {

// A ParallelFor on torch's own threads. Each of the n pieces is large enough for a thread.
inline void torch_parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, 1, body);
}

}  // namespace taskgroup
