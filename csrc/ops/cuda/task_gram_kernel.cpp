#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "ops/cuda/contiguous.h"
#include "ops/cuda/gram.h"
#include "ops/cuda/launch.h"
#include "ops/gradient_list.h"
#include "ops/plain_gradients.h"
#include "ops/task_gram.h"

namespace taskgroup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Tensor run(const Gradients& gradients, const Tensor& like, const Launch& launch) {
  const ScalarType dtype = gram_dtype(gradients);
  const int64_t K = gradients.n_tasks;
  Tensor matrix = torch::stable::new_empty(like, {K, K}, dtype);
  std::optional<Tensor> scratch;
  const auto allocate = [&](int64_t n) {
    scratch = torch::stable::new_empty(like, {n}, ScalarType::Double);
    return scratch->mutable_data_ptr<double>();
  };
  if (dtype == ScalarType::Double) {
    gram(gradients, allocate, launch.stream(),
         GramMatrix<double>{matrix.mutable_data_ptr<double>(), K});
  } else {
    gram(gradients, allocate, launch.stream(),
         GramMatrix<float>{matrix.mutable_data_ptr<float>(), K});
  }
  launch.check("task_gram");
  return matrix;
}

Tensor task_gram_cuda(std::vector<Tensor> list, std::vector<int64_t> slots, int64_t n_tasks) {
  Gradients gradients = read_gradients(list, slots, n_tasks);
  const Launch launch(list[0]);
  const std::vector<Tensor> copies = make_contiguous(gradients, list);
  return run(gradients, list[0], launch);
}

Tensor plain_task_gram_cuda(int64_t gradients, Tensor like) {
  return run(plain_gradients(gradients).gradients, like, Launch(like));
}

static_assert(std::is_same_v<decltype(task_gram_cuda), TaskGram>);
static_assert(std::is_same_v<decltype(plain_task_gram_cuda), PlainTaskGram>);

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CUDA, library) {
  library.impl("task_gram", TORCH_BOX(&taskgroup::task_gram_cuda));
  library.impl("_plain_task_gram", TORCH_BOX(&taskgroup::plain_task_gram_cuda));
}
