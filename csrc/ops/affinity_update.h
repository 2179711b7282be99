#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace taskgroup {

// What both updates of an affinity matrix write, checked as below. Returns K.
//
//   matrix    [K, K] float32, contiguous
//   observed  [K, K] int32, contiguous, in other memory: how often each entry was observed
int64_t check_affinity(const torch::stable::Tensor& matrix,
                       const std::optional<torch::stable::Tensor>& observed);

// [K, K], or null where nobody counts.
inline int32_t* counts(const std::optional<torch::stable::Tensor>& observed) {
  return observed.has_value() ? observed->mutable_data_ptr<int32_t>() : nullptr;
}

// Raises, naming the argument, unless the kernels below may touch these tensors. The Python face
// checks first and in more words; this is what keeps a direct call of the op inside its memory.
// Returns the number of tasks K.
int64_t check_affinity_update(const torch::stable::Tensor& matrix,  // [K, K] float32, contiguous
                              const torch::stable::Tensor& before,  // [K] float32 or float64
                              const torch::stable::Tensor& after,   // [K] like before
                              const torch::stable::Tensor& mask,    // [K] bool
                              double decay,                         // in (0, 1]
                              const std::optional<torch::stable::Tensor>& observed);

}  // namespace taskgroup
