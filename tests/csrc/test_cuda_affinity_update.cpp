#include <random>
#include <vector>

#include "check.h"
#include "ops/cuda/affinity_update_kernel.cuh"

namespace taskgroup {

// Updates the matrix and the counts by applying the rules one by one.
template <typename scalar_t>
void update(std::vector<float>& matrix, std::vector<int32_t>& observed,
            const std::vector<scalar_t>& before, const std::vector<scalar_t>& after,
            const bool* mask, double decay) {
  const size_t K = before.size();
  int size = 0;
  bool stepped = false;
  std::vector<double> ratio(K, NAN);
  for (size_t k = 0; k < K; ++k) size += mask[k];
  for (size_t k = 0; k < K; ++k) {
    const double b = before[k], a = after[k];
    if (!(std::isfinite(b) && b > 0 && std::isfinite(a))) continue;
    stepped |= a != b;
    ratio[k] = std::fmax(-1.0, std::fmin(1.0, 1.0 - a / b)) / size;
  }
  for (size_t i = 0; stepped && i < K; ++i) {
    for (size_t k = 0; mask[i] && k < K; ++k) {
      double seen = ratio[k];
      if (mask[k] && i == k && !(ratio[i] >= 0)) continue;
      if (mask[k] && i != k) {
        if (std::isnan(ratio[i])) continue;
        if (ratio[i] * ratio[k] < 0) seen = -std::fmax(ratio[i], ratio[k]);
      }
      if (std::isnan(seen)) continue;
      float& entry = matrix[i * K + k];
      entry = static_cast<float>((1.0 - decay) * entry + decay * seen);
      ++observed[i * K + k];
    }
  }
}

template <typename scalar_t>
void test(int64_t K, int threads, int kind) {
  std::mt19937 random(static_cast<unsigned>(K) + kind);
  std::uniform_real_distribution<double> uniform(0.1, 3.0);
  std::vector<float> matrix(K * K);
  std::vector<int32_t> observed(K * K);
  std::vector<scalar_t> before(K), after(K);
  const auto mask = std::make_unique<bool[]>(K);
  for (float& entry : matrix) entry = static_cast<float>(uniform(random));
  for (int32_t& count : observed) count = static_cast<int32_t>(random() % 5);
  for (int64_t k = 0; k < K; ++k) {
    before[k] = static_cast<scalar_t>(uniform(random));
    after[k] = kind == 1 ? before[k] : static_cast<scalar_t>(uniform(random));
    mask[k] = kind == 2 ? true : random() % 2 == 0;
    if (kind == 3) {
      const double odd[] = {0.0, -1.0, NAN, INFINITY};
      if (random() % 3 == 0) before[k] = static_cast<scalar_t>(odd[random() % 4]);
      if (random() % 4 == 0) after[k] = static_cast<scalar_t>(odd[random() % 4]);
    }
  }
  auto right = matrix;
  auto counts = observed;
  update(right, counts, before, after, mask.get(), 0.25);
  for (const bool counted : {false, true}) {
    auto got = matrix;
    shim::launch({counted ? 3u : 1u, 1}, threads, K * sizeof(double), [&](void* ratio) {
      affinity_update_block(got.data(), before.data(), after.data(), mask.get(), K, 0.25,
                            static_cast<double*>(ratio), counted ? observed.data() : nullptr);
    });
    CHECK(got == right);  // bitwise
  }
  CHECK(observed == counts);
}

}  // namespace taskgroup

int main() {
  for (const int kind : {0, 1, 2, 3}) {
    for (const int K : {1, 11, 70}) taskgroup::test<float>(K, 32, kind);
    taskgroup::test<double>(40, 64, kind);
  }
}
