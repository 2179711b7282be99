#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "ops/gradients.h"

namespace taskgroup {

// Replaces the gradients of each `strided` parameter by contiguous copies, which the result owns.
// The result may be freed as soon as the kernels that read the copies are queued on their stream.
inline std::vector<torch::stable::Tensor> make_contiguous(
    Gradients& gradients, const std::vector<torch::stable::Tensor>& list) {
  std::vector<torch::stable::Tensor> copies;
  for (const Parameter& parameter : gradients.parameters) {
    if (!parameter.strided) continue;
    for (int64_t i = parameter.begin; i < parameter.end; ++i) {
      copies.push_back(torch::stable::contiguous(list[i]));
      gradients.all[i].data = copies.back().const_data_ptr();
    }
  }
  return copies;
}

}  // namespace taskgroup
