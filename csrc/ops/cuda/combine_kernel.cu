#include "ops/cuda/combine_kernel.cuh"

#include <torch/csrc/stable/library.h>

#include <utility>

#include "ops/combine.h"
#include "ops/cuda/contiguous.h"
#include "ops/cuda/launch.h"
#include "ops/plain_gradients.h"

namespace taskgroup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ CombineTable table) {
  __shared__ wide_t<T> weights[kMostTasks];
  combine_block<T, kThreads>(table, weights);
}

template <typename T>
void run(const Gradients& gradients, Dtype dtype, const std::vector<void*>& outputs,
         const Tensor& weights, cudaStream_t stream) {
  for_each_combine_table<T, kThreads>(
      gradients, dtype, outputs, weights.const_data_ptr(),
      weights.scalar_type() == ScalarType::Double, [&](const CombineTable& table, int64_t blocks) {
        combine<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(table);
      });
}

void run(const Gradients& gradients, const std::vector<void*>& outputs, const Tensor& weights,
         const Launch& launch) {
  run<float>(gradients, Dtype::kFloat, outputs, weights, launch.stream());
  run<double>(gradients, Dtype::kDouble, outputs, weights, launch.stream());
  run<BFloat16>(gradients, Dtype::kBFloat16, outputs, weights, launch.stream());
  run<Half>(gradients, Dtype::kHalf, outputs, weights, launch.stream());
  launch.check("combine");
}

void combine_cuda(std::vector<Tensor> list, std::vector<int64_t> slots, Tensor weights,
                  std::vector<Tensor> out) {
  Gradients gradients = check_combine(list, slots, weights, out);
  if (list.empty()) return;
  const Launch launch(list[0]);
  const std::vector<Tensor> copies = make_contiguous(gradients, list);
  std::vector<std::pair<size_t, Tensor>> scattered;  // contiguous stand-ins for strided outputs
  std::vector<void*> outputs;
  for (size_t t = 0; t < out.size(); ++t) {
    Tensor to = out[t];
    if (gradients.parameters[t].strided && !to.is_contiguous()) {
      to = torch::stable::new_empty(to, to.sizes());
      scattered.emplace_back(t, to);
    }
    outputs.push_back(to.mutable_data_ptr());
  }
  run(gradients, outputs, weights, launch);
  for (auto& [t, to] : scattered) torch::stable::copy_(out[t], to);
}

void plain_combine_cuda(int64_t gradients, Tensor weights) {
  check_weights(weights);
  const PlainGradients& plain = plain_gradients(gradients);
  run(plain.gradients, plain.outputs, weights, Launch(weights));
}

static_assert(std::is_same_v<decltype(combine_cuda), Combine>);
static_assert(std::is_same_v<decltype(plain_combine_cuda), PlainCombine>);

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CUDA, library) {
  library.impl("combine", TORCH_BOX(&taskgroup::combine_cuda));
  library.impl("_plain_combine", TORCH_BOX(&taskgroup::plain_combine_cuda));
}
