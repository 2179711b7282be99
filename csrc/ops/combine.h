#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "ops/gradient_list.h"

namespace taskgroup {

// One per backend: csrc/ops/<backend>/combine_kernel.
//
//   gradients, slots  see gradient_list.h
//   weights           [K] float32 or float64, contiguous, on the device of the gradients
//   out               one for each parameter that has a gradient, in their order, of its shape and
//                     dtype; may be one of the gradients, may not overlap one otherwise
using Combine = void(std::vector<torch::stable::Tensor> gradients, std::vector<int64_t> slots,
                     torch::stable::Tensor weights, std::vector<torch::stable::Tensor> out);

// The same of plain gradients with their outputs, see plain_gradients.h.
using PlainCombine = void(int64_t gradients, torch::stable::Tensor weights);

// Raises unless the weights are as above.
void check_weights(const torch::stable::Tensor& weights);

// Reads the gradients and checks the rest; marks as `strided` each parameter whose gradients cannot
// be visited in the order of memory of its output.
Gradients check_combine(const std::vector<torch::stable::Tensor>& gradients,
                        const std::vector<int64_t>& slots, const torch::stable::Tensor& weights,
                        const std::vector<torch::stable::Tensor>& out);

}  // namespace taskgroup
