#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "ops/gradients.h"

namespace taskgroup {

// The ops take the gradients of K tasks on T parameters as one flat list without the missing ones,
// sorted by slot = parameter * K + task. An empty `slots` means 0, 1, 2, ...: no gradient is
// missing. Raises an error if the list cannot be read safely: mixed devices, dtypes or shapes. The
// Python function raises the same errors with longer messages.
//
// The tensors own the memory that the result points to.
Gradients read_gradients(const std::vector<torch::stable::Tensor>& gradients,
                         const std::vector<int64_t>& slots, int64_t n_tasks);

// Whether two tensors of these sizes have the same order of elements in memory.
bool same_strides(const int64_t* sizes, const int64_t* a, const int64_t* b, int64_t dim);

Dtype dtype_of(const torch::stable::Tensor& tensor);

// The dtype of the Gram matrix: float64 if any gradient is float64, else float32.
torch::headeronly::ScalarType gram_dtype(const Gradients& gradients);

}  // namespace taskgroup
