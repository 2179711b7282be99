#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "ops/affinity_update.h"
#include "ops/cuda/contiguous.h"
#include "ops/cuda/gram.h"
#include "ops/cuda/launch.h"
#include "ops/gram_affinity_update.h"
#include "ops/plain_gradients.h"

namespace taskgroup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void run(Tensor matrix, const Gradients& gradients, const std::vector<int64_t>& tasks,
         const Tensor& losses, double decay, double lr, const std::optional<Tensor>& observed,
         const Launch& launch) {
  STD_TORCH_CHECK(matrix.size(0) <= 65536, "matrix must have at most 65536 rows on CUDA.");
  GramAffinity result = {};
  result.matrix = matrix.mutable_data_ptr<float>();
  result.K = matrix.size(0);
  result.losses = losses.const_data_ptr();
  result.wide_losses = losses.scalar_type() == ScalarType::Double;
  result.decay = decay;
  result.lr = lr;
  result.observed = counts(observed);
  std::copy(tasks.begin(), tasks.end(), result.tasks);
  std::optional<Tensor> scratch;
  const auto allocate = [&](int64_t n) {
    scratch = torch::stable::new_empty(matrix, {n}, ScalarType::Double);
    return scratch->mutable_data_ptr<double>();
  };
  gram(gradients, allocate, launch.stream(), result);
  launch.check("gram_affinity_update_");
}

void gram_affinity_update_cuda(Tensor matrix, std::vector<Tensor> list, std::vector<int64_t> slots,
                               std::vector<int64_t> tasks, Tensor losses, double decay, double lr,
                               std::optional<Tensor> observed) {
  Gradients gradients =
      check_gram_affinity_update(matrix, list, slots, tasks, losses, decay, observed);
  const Launch launch(matrix);
  const std::vector<Tensor> copies = make_contiguous(gradients, list);
  run(matrix, gradients, tasks, losses, decay, lr, observed, launch);
}

void plain_gram_affinity_update_cuda(Tensor matrix, int64_t gradients, std::vector<int64_t> tasks,
                                     Tensor losses, double decay, double lr,
                                     std::optional<Tensor> observed) {
  check_gram_affinity_update(matrix, tasks, losses, decay, observed);
  run(matrix, plain_gradients(gradients).gradients, tasks, losses, decay, lr, observed,
      Launch(matrix));
}

static_assert(std::is_same_v<decltype(gram_affinity_update_cuda), GramAffinityUpdate>);
static_assert(std::is_same_v<decltype(plain_gram_affinity_update_cuda), PlainGramAffinityUpdate>);

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CUDA, library) {
  library.impl("gram_affinity_update_", TORCH_BOX(&taskgroup::gram_affinity_update_cuda));
  library.impl("_plain_gram_affinity_update_",
               TORCH_BOX(&taskgroup::plain_gram_affinity_update_cuda));
}
