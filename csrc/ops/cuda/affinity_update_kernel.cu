#include "ops/cuda/affinity_update_kernel.cuh"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "ops/affinity_update.h"
#include "ops/cuda/launch.h"

namespace taskgroup {

using torch::stable::Tensor;

namespace {

constexpr int64_t kMostBlocks = 128;  // about as many as an H100 has multiprocessors
constexpr int64_t kMostTasks =
    6144;  // their ratios take 48 KB, which is the shared memory of a block on every GPU

template <typename scalar_t>
__global__ void affinity_update(float* matrix, const scalar_t* before, const scalar_t* after,
                                const bool* mask, int64_t K, double decay, int32_t* observed) {
  extern __shared__ double ratio[];  // [K]
  affinity_update_block(matrix, before, after, mask, K, decay, ratio, observed);
}

void affinity_update_cuda(Tensor matrix, Tensor before, Tensor after, Tensor mask, double decay,
                          std::optional<Tensor> observed) {
  const int64_t K = check_affinity_update(matrix, before, after, mask, decay, observed);
  STD_TORCH_CHECK(K <= kMostTasks, "matrix must have at most ", kMostTasks, " rows on CUDA, got ",
                  K, ".");
  if (K == 0) return;
  const Launch launch(matrix);
  const auto run = [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto threads = static_cast<unsigned>(std::min<int64_t>((K + 31) / 32 * 32, 1024));
    const auto blocks = static_cast<unsigned>(std::min(K, kMostBlocks));
    affinity_update<<<blocks, threads, K * sizeof(double), launch.stream()>>>(
        matrix.mutable_data_ptr<float>(), before.const_data_ptr<scalar_t>(),
        after.const_data_ptr<scalar_t>(), mask.const_data_ptr<bool>(), K, decay, counts(observed));
  };
  if (before.scalar_type() == torch::headeronly::ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  launch.check("affinity_update_");
}

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CUDA, library) {
  library.impl("affinity_update_", TORCH_BOX(&taskgroup::affinity_update_cuda));
}
