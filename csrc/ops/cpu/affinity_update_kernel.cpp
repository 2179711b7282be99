#include "ops/cpu/affinity_update.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "ops/affinity_update.h"

namespace taskgroup {

using torch::stable::Tensor;

namespace {

void affinity_update_cpu(Tensor matrix, Tensor before, Tensor after, Tensor mask, double decay,
                         std::optional<Tensor> observed) {
  const int64_t K = check_affinity_update(matrix, before, after, mask, decay, observed);
  const auto run = [&](auto zero) {
    using scalar_t = decltype(zero);
    update_affinity(matrix.mutable_data_ptr<float>(), before.const_data_ptr<scalar_t>(),
                    after.const_data_ptr<scalar_t>(), mask.const_data_ptr<bool>(), K, decay,
                    counts(observed));
  };
  if (before.scalar_type() == torch::headeronly::ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
}

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CPU, library) {
  library.impl("affinity_update_", TORCH_BOX(&taskgroup::affinity_update_cpu));
}
