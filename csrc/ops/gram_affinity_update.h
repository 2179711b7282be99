#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "ops/gradient_list.h"

namespace taskgroup {

// The signature of the op. Each backend implements it in
// csrc/ops/<backend>/gram_affinity_update_kernel.
//
//   matrix            [K, K] float32, contiguous; updated in place
//   gradients, slots  of the measured tasks, numbered 0..n-1; see gradient_list.h
//   tasks             [n] the row and column of each measured task, 0..K-1, ascending
//   losses            [K] float32 or float64, contiguous, on the device of the gradients
//   decay             in (0, 1]
//   lr                scales the observation lr * <g_i, g_k> / L_k
//   observed          [K, K] int32, contiguous: the observations of each entry; updated in place
using GramAffinityUpdate = void(torch::stable::Tensor matrix,
                                std::vector<torch::stable::Tensor> gradients,
                                std::vector<int64_t> slots, std::vector<int64_t> tasks,
                                torch::stable::Tensor losses, double decay, double lr,
                                std::optional<torch::stable::Tensor> observed);

// The same for plain gradients of the measured tasks, see plain_gradients.h.
using PlainGramAffinityUpdate = void(torch::stable::Tensor matrix, int64_t gradients,
                                     std::vector<int64_t> tasks, torch::stable::Tensor losses,
                                     double decay, double lr,
                                     std::optional<torch::stable::Tensor> observed);

// Raises an error if an argument other than the gradients is not as above.
void check_gram_affinity_update(const torch::stable::Tensor& matrix,
                                const std::vector<int64_t>& tasks,
                                const torch::stable::Tensor& losses, double decay,
                                const std::optional<torch::stable::Tensor>& observed);

// Reads the gradients and checks the other arguments.
Gradients check_gram_affinity_update(const torch::stable::Tensor& matrix,
                                     const std::vector<torch::stable::Tensor>& gradients,
                                     const std::vector<int64_t>& slots,
                                     const std::vector<int64_t>& tasks,
                                     const torch::stable::Tensor& losses, double decay,
                                     const std::optional<torch::stable::Tensor>& observed);

}  // namespace taskgroup
