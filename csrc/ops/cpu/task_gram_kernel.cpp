#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "ops/cpu/gram.h"
#include "ops/cpu/torch_parallel.h"
#include "ops/gradient_list.h"
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

Tensor task_gram_cpu(std::vector<Tensor> list, std::vector<int64_t> slots, int64_t n_tasks) {
  const Gradients gradients = read_gradients(list, slots, n_tasks);
  const ScalarType dtype = gram_dtype(gradients);
  Tensor matrix = torch::stable::new_empty(list[0], {n_tasks, n_tasks}, dtype);
  (dtype == ScalarType::Double ? fill<double> : fill<float>)(matrix, gradients);
  return matrix;
}

static_assert(std::is_same_v<decltype(task_gram_cpu), TaskGram>);

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CPU, library) {
  library.impl("task_gram", TORCH_BOX(&taskgroup::task_gram_cpu));
}
