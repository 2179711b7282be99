#include "ops/combine.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace taskgroup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_weights(const Tensor& weights) {
  STD_TORCH_CHECK(weights.dim() == 1, "weights must have shape [K].");
  STD_TORCH_CHECK(weights.is_contiguous(), "weights must be contiguous.");
  STD_TORCH_CHECK(
      weights.scalar_type() == ScalarType::Float || weights.scalar_type() == ScalarType::Double,
      "weights must be float32 or float64.");
}

Gradients check_combine(const std::vector<Tensor>& gradients, const std::vector<int64_t>& slots,
                        const Tensor& weights, const std::vector<Tensor>& out) {
  check_weights(weights);
  Gradients read = read_gradients(gradients, slots, weights.size(0));
  STD_TORCH_CHECK(gradients.empty() || weights.device() == gradients[0].device(),
                  "weights must be on the device of the gradients.");
  STD_TORCH_CHECK(out.size() == read.parameters.size(),
                  "out must hold one tensor per parameter that has a gradient.");
  for (size_t t = 0; t < out.size(); ++t) {
    Parameter& parameter = read.parameters[t];
    const auto sizes = out[t].sizes();
    STD_TORCH_CHECK(out[t].device() == gradients[0].device() &&
                        dtype_of(out[t]) == parameter.dtype && out[t].dim() == parameter.dim &&
                        std::equal(sizes.begin(), sizes.end(), parameter.sizes),
                    "out must have the shape, dtype and device of the gradients: entry ", t,
                    " differs.");
    const auto strides = out[t].strides();
    parameter.strided |= !same_strides(parameter.sizes, strides.data(),
                                       read.all[parameter.begin].strides, parameter.dim);
  }
  return read;
}

}  // namespace taskgroup

STABLE_TORCH_LIBRARY_FRAGMENT(taskgroup, library) {
  library.def("combine(Tensor[] gradients, int[] slots, Tensor weights, Tensor(a!)[] out) -> ()");
  library.def("_plain_combine(int gradients, Tensor weights) -> ()");
}
