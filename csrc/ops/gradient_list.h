#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "ops/gradients.h"

namespace taskgroup {

// How the ops take the gradients of K tasks on T parameters: one flat list of those that are there,
// sorted by slot = parameter * K + task. An empty `slots` stands for 0, 1, 2, ...: all are there.
// Raises where the list cannot be read safely: mixed devices, dtypes or shapes. The Python face
// says the same in more words.
//
// The tensors own the memory that the result points to.
Gradients read_gradients(const std::vector<torch::stable::Tensor>& gradients,
                         const std::vector<int64_t>& slots, int64_t n_tasks);

// Whether two tensors of these sizes lie in memory in the same order.
bool same_strides(const int64_t* sizes, const int64_t* a, const int64_t* b, int64_t dim);

Dtype dtype_of(const torch::stable::Tensor& tensor);

// Float64 if any gradient is, else float32: the dtype of their Gram matrix.
torch::headeronly::ScalarType gram_dtype(const Gradients& gradients);

}  // namespace taskgroup
