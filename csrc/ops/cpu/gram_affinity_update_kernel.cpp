#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

#include "ops/affinity_update.h"
#include "ops/cpu/gram.h"
#include "ops/cpu/torch_parallel.h"
#include "ops/gram_affinity_update.h"
#include "ops/plain_gradients.h"

namespace taskgroup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

template <typename scalar_t>
void update(float* matrix,  // [K, K]
            const Gradients& gradients, const std::vector<int64_t>& tasks,
            const scalar_t* losses,  // [K]
            int64_t K, double decay, double lr,
            int32_t* observed) {  // [K, K] or null
  const auto observe = [&](int64_t i, int64_t k, double product) {
    const double loss = losses[k];
    if (!(std::isfinite(product) && std::isfinite(loss) && loss > 0.0)) return;
    float& entry = matrix[i * K + k];
    entry = static_cast<float>((1.0 - decay) * static_cast<double>(entry) +
                               decay * (lr * product / loss));
    if (observed != nullptr) ++observed[i * K + k];
  };
  gram(gradients, gradient_loops(), torch_parallel_for, [&](int64_t i, int64_t k, double product) {
    observe(tasks[i], tasks[k], product);
    if (i != k) observe(tasks[k], tasks[i], product);
  });
}

void run(Tensor matrix, const Gradients& gradients, const std::vector<int64_t>& tasks,
         const Tensor& losses, double decay, double lr, const std::optional<Tensor>& observed) {
  const auto update_by = [&](auto zero) {
    using scalar_t = decltype(zero);
    update(matrix.mutable_data_ptr<float>(), gradients, tasks, losses.const_data_ptr<scalar_t>(),
           matrix.size(0), decay, lr, counts(observed));
  };
  if (losses.scalar_type() == ScalarType::Double) {
    update_by(double{});
  } else {
    update_by(float{});
  }
}

void gram_affinity_update_cpu(Tensor matrix, std::vector<Tensor> list, std::vector<int64_t> slots,
                              std::vector<int64_t> tasks, Tensor losses, double decay, double lr,
                              std::optional<Tensor> observed) {
  const Gradients gradients =
      check_gram_affinity_update(matrix, list, slots, tasks, losses, decay, observed);
  run(matrix, gradients, tasks, losses, decay, lr, observed);
}

void plain_gram_affinity_update_cpu(Tensor matrix, int64_t gradients, std::vector<int64_t> tasks,
                                    Tensor losses, double decay, double lr,
                                    std::optional<Tensor> observed) {
  check_gram_affinity_update(matrix, tasks, losses, decay, observed);
  run(matrix, plain_gradients(gradients).gradients, tasks, losses, decay, lr, observed);
}

static_assert(std::is_same_v<decltype(gram_affinity_update_cpu), GramAffinityUpdate>);
static_assert(std::is_same_v<decltype(plain_gram_affinity_update_cpu), PlainGramAffinityUpdate>);

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CPU, library) {
  library.impl("gram_affinity_update_", TORCH_BOX(&taskgroup::gram_affinity_update_cpu));
  library.impl("_plain_gram_affinity_update_",
               TORCH_BOX(&taskgroup::plain_gram_affinity_update_cpu));
}
