#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace taskgroup {

// Raises, naming the argument, unless the kernels below may touch these tensors. The Python face
// checks first and in more words; this is what keeps a direct call of the op inside its memory.
// Returns the number of tasks K.
int64_t check_affinity_update(const torch::stable::Tensor& matrix,  // [K, K] float32, contiguous
                              const torch::stable::Tensor& before,  // [K] float32 or float64
                              const torch::stable::Tensor& after,   // [K] like before
                              const torch::stable::Tensor& mask,    // [K] bool
                              double decay);                        // in (0, 1]

}  // namespace taskgroup
