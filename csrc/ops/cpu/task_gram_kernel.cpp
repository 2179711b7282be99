#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "ops/cpu/gram.h"
#include "ops/cpu/torch_parallel.h"
#include "ops/gradient_list.h"
#include "ops/plain_gradients.h"
#include "ops/task_gram.h"

namespace taskgroup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <typename T>
void fill(Tensor& matrix, const Gradients& gradients) {
  T* out = matrix.mutable_data_ptr<T>();
  const int64_t K = gradients.n_tasks;
  gram(gradients, gradient_loops(), torch_parallel_for, [&](int64_t i, int64_t j, double product) {
    out[i * K + j] = out[j * K + i] = static_cast<T>(product);
  });
}

Tensor run(const Gradients& gradients, const Tensor& like) {
  const ScalarType dtype = gram_dtype(gradients);
  const int64_t K = gradients.n_tasks;
  Tensor matrix = torch::stable::new_empty(like, {K, K}, dtype);
  (dtype == ScalarType::Double ? fill<double> : fill<float>)(matrix, gradients);
  return matrix;
}

Tensor task_gram_cpu(std::vector<Tensor> list, std::vector<int64_t> slots, int64_t n_tasks) {
  return run(read_gradients(list, slots, n_tasks), list[0]);
}

Tensor plain_task_gram_cpu(int64_t gradients, Tensor like) {
  return run(plain_gradients(gradients).gradients, like);
}

static_assert(std::is_same_v<decltype(task_gram_cpu), TaskGram>);
static_assert(std::is_same_v<decltype(plain_task_gram_cpu), PlainTaskGram>);

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CPU, library) {
  library.impl("task_gram", TORCH_BOX(&taskgroup::task_gram_cpu));
  library.impl("_plain_task_gram", TORCH_BOX(&taskgroup::plain_task_gram_cpu));
}
