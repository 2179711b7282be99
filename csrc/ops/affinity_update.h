#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace taskgroup {

// Checks the tensors that both updates of an affinity matrix write to. Returns K.
//
//   matrix    [K, K] float32, contiguous
//   observed  [K, K] int32, contiguous, in separate memory: the number of observations of each
//   entry
int64_t check_affinity(const torch::stable::Tensor& matrix,
                       const std::optional<torch::stable::Tensor>& observed);

// [K, K], or null if observations are not counted.
inline int32_t* counts(const std::optional<torch::stable::Tensor>& observed) {
  return observed.has_value() ? observed->mutable_data_ptr<int32_t>() : nullptr;
}

// Checks that the kernels can read and write these tensors safely; the error names the argument.
// The Python function checks first, with longer messages; this check protects direct calls of the
// op. Returns the number of tasks K.
int64_t check_affinity_update(const torch::stable::Tensor& matrix,  // [K, K] float32, contiguous
                              const torch::stable::Tensor& before,  // [K] float32 or float64
                              const torch::stable::Tensor& after,   // [K] like before
                              const torch::stable::Tensor& mask,    // [K] bool
                              double decay,                         // in (0, 1]
                              const std::optional<torch::stable::Tensor>& observed);

}  // namespace taskgroup
