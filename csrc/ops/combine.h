#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "ops/gradient_list.h"

namespace taskgroup {

// The signature of the op. Each backend implements it in csrc/ops/<backend>/combine_kernel.
//
//   gradients, slots  see gradient_list.h
//   weights           [K] float32 or float64, contiguous, on the device of the gradients
//   out               one tensor for each parameter that has a gradient, in their order, with the
//                     shape and dtype of the parameter; may be one of the gradients, but may not
//                     overlap one in another way
using Combine = void(std::vector<torch::stable::Tensor> gradients, std::vector<int64_t> slots,
                     torch::stable::Tensor weights, std::vector<torch::stable::Tensor> out);

// The same for plain gradients with their outputs, see plain_gradients.h.
using PlainCombine = void(int64_t gradients, torch::stable::Tensor weights);

// Raises an error if the weights are not as above.
void check_weights(const torch::stable::Tensor& weights);

// Reads the gradients and checks the other arguments. Marks a parameter as `strided` if its
// gradients and its output have different orders of elements in memory.
Gradients check_combine(const std::vector<torch::stable::Tensor>& gradients,
                        const std::vector<int64_t>& slots, const torch::stable::Tensor& weights,
                        const std::vector<torch::stable::Tensor>& out);

}  // namespace taskgroup
