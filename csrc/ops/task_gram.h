#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace taskgroup {

// The signature of the op. Each backend implements it in csrc/ops/<backend>/task_gram_kernel.
//
//   gradients, slots  see gradient_list.h
//   n_tasks           K, 1 to 1024
//   returns           [K, K] float32, or float64 if any gradient is; entry i, j is <g_i, g_j>
using TaskGram = torch::stable::Tensor(std::vector<torch::stable::Tensor> gradients,
                                       std::vector<int64_t> slots, int64_t n_tasks);

// The same for plain gradients, see plain_gradients.h; `like` is any tensor on their device.
using PlainTaskGram = torch::stable::Tensor(int64_t gradients, torch::stable::Tensor like);

}  // namespace taskgroup
