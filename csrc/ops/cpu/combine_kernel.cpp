#include "ops/combine.h"

#include <torch/csrc/stable/library.h>

#include "ops/cpu/combine.h"
#include "ops/cpu/torch_parallel.h"
#include "ops/plain_gradients.h"

namespace taskgroup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void run(const Gradients& gradients, const Tensor& weights, const std::vector<Output>& outputs) {
  std::vector<double> wide(weights.numel());
  if (weights.scalar_type() == ScalarType::Double) {
    std::copy_n(weights.const_data_ptr<double>(), wide.size(), wide.begin());
  } else {
    std::copy_n(weights.const_data_ptr<float>(), wide.size(), wide.begin());
  }
  combine(gradients, wide.data(), outputs, gradient_loops(), torch_parallel_for);
}

void combine_cpu(std::vector<Tensor> list, std::vector<int64_t> slots, Tensor weights,
                 std::vector<Tensor> out) {
  const Gradients gradients = check_combine(list, slots, weights, out);
  std::vector<Output> outputs;
  for (const Tensor& tensor : out) {
    outputs.push_back({tensor.mutable_data_ptr(), tensor.strides().data()});
  }
  run(gradients, weights, outputs);
}

void plain_combine_cpu(int64_t gradients, Tensor weights) {
  check_weights(weights);
  const PlainGradients& plain = plain_gradients(gradients);
  std::vector<Output> outputs;
  for (void* data : plain.outputs) outputs.push_back({data, nullptr});
  run(plain.gradients, weights, outputs);
}

static_assert(std::is_same_v<decltype(combine_cpu), Combine>);
static_assert(std::is_same_v<decltype(plain_combine_cpu), PlainCombine>);

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CPU, library) {
  library.impl("combine", TORCH_BOX(&taskgroup::combine_cpu));
  library.impl("_plain_combine", TORCH_BOX(&taskgroup::plain_combine_cpu));
}
