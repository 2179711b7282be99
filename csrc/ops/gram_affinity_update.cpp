#include "ops/gram_affinity_update.h"

#include <torch/csrc/stable/library.h>

#include "ops/affinity_update.h"

namespace taskgroup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_gram_affinity_update(const Tensor& matrix, const std::vector<int64_t>& tasks,
                                const Tensor& losses, double decay,
                                const std::optional<Tensor>& observed) {
  const int64_t K = check_affinity(matrix, observed);
  STD_TORCH_CHECK(losses.dim() == 1 && losses.size(0) == K,
                  "losses must have shape [K] with K = ", K, ", the rows of matrix.");
  STD_TORCH_CHECK(losses.is_contiguous(), "losses must be contiguous.");
  STD_TORCH_CHECK(
      losses.scalar_type() == ScalarType::Float || losses.scalar_type() == ScalarType::Double,
      "losses must be float32 or float64.");
  STD_TORCH_CHECK(losses.device() == matrix.device(), "losses must be on the device of matrix.");
  STD_TORCH_CHECK(decay > 0.0 && decay <= 1.0, "decay must be in (0, 1], got ", decay, ".");
  int64_t last = -1;
  for (const int64_t task : tasks) {
    STD_TORCH_CHECK(task > last && task < K, "tasks must ascend and be rows of matrix.");
    last = task;
  }
}

Gradients check_gram_affinity_update(const Tensor& matrix, const std::vector<Tensor>& gradients,
                                     const std::vector<int64_t>& slots,
                                     const std::vector<int64_t>& tasks, const Tensor& losses,
                                     double decay, const std::optional<Tensor>& observed) {
  check_gram_affinity_update(matrix, tasks, losses, decay, observed);
  Gradients read = read_gradients(gradients, slots, static_cast<int64_t>(tasks.size()));
  STD_TORCH_CHECK(gradients.empty() || gradients[0].device() == matrix.device(),
                  "gradients must be on the device of matrix.");
  return read;
}

}  // namespace taskgroup

STABLE_TORCH_LIBRARY_FRAGMENT(taskgroup, library) {
  library.def(
      "gram_affinity_update_(Tensor(a!) matrix, Tensor[] gradients, int[] slots, int[] tasks, "
      "Tensor losses, float decay, float lr, Tensor(b!)? observed=None) -> ()");
  library.def(
      "_plain_gram_affinity_update_(Tensor(a!) matrix, int gradients, int[] tasks, Tensor losses, "
      "float decay, float lr, Tensor(b!)? observed=None) -> ()");
}
