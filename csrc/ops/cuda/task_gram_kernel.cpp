#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "ops/cuda/contiguous.h"
#include "ops/cuda/gram.h"
#include "ops/cuda/launch.h"
#include "ops/gradient_list.h"
#include "ops/task_gram.h"

namespace taskgroup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Tensor task_gram_cuda(std::vector<Tensor> list, std::vector<int64_t> slots, int64_t n_tasks) {
  Gradients gradients = read_gradients(list, slots, n_tasks);
  const Launch launch(list[0]);
  const std::vector<Tensor> copies = make_contiguous(gradients, list);
  const ScalarType dtype = gram_dtype(gradients);
  Tensor matrix = torch::stable::new_empty(list[0], {n_tasks, n_tasks}, dtype);
  std::optional<Tensor> scratch;
  const auto allocate = [&](int64_t n) {
    scratch = torch::stable::new_empty(list[0], {n}, ScalarType::Double);
    return scratch->mutable_data_ptr<double>();
  };
  if (dtype == ScalarType::Double) {
    gram(gradients, allocate, launch.stream(),
         GramMatrix<double>{matrix.mutable_data_ptr<double>(), n_tasks});
  } else {
    gram(gradients, allocate, launch.stream(),
         GramMatrix<float>{matrix.mutable_data_ptr<float>(), n_tasks});
  }
  launch.check("task_gram");
  return matrix;
}

static_assert(std::is_same_v<decltype(task_gram_cuda), TaskGram>);

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CUDA, library) {
  library.impl("task_gram", TORCH_BOX(&taskgroup::task_gram_cuda));
}
