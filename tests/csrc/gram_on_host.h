#pragma once

// Runs the two passes of the kernels that compute a Gram matrix on the host.

#include <functional>
#include <vector>

#include "check.h"
#include "ops/cuda/gram_finish.cuh"
#include "ops/cuda/gram_fma.cuh"
#include "ops/cuda/gram_mma.cuh"
#include "random_gradients.h"

namespace taskgroup {

using Pass = std::function<void(const GramTable&, double* partial)>;

inline std::vector<double>& last_partial() {
  static std::vector<double> partial;  // [segments, K (K + 1) / 2]
  return partial;
}

template <typename Result>
void finish_on_host(const std::vector<double>& partial, int64_t K, const Result& result) {
  constexpr int kThreads = 64;
  const auto columns = static_cast<unsigned>((K + 31) / 32), rows = static_cast<unsigned>(K);
  shim::launch({columns, rows}, kThreads, kThreads * sizeof(double), [&](void* shared) {
    gram_finish_block<kThreads>(partial.data(), partial.size() / (K * (K + 1) / 2), K, result,
                                shared);
  });
}

// [K, K]
template <typename G>
std::vector<double> gram_on_host(const Gradients& gradients, Dtype dtype, const Pass& pass) {
  const int64_t K = gradients.n_tasks;
  std::vector<GramTable> tables = gram_tables(gradients, dtype, G::kTile, 2, 4);
  const int64_t segments = number_segments(tables, 0);
  last_partial().assign(segments * K * (K + 1) / 2, 1e300);  // every sum must be overwritten
  for (const GramTable& table : tables) pass(table, last_partial().data());
  std::vector<double> matrix(K * K, NAN);
  finish_on_host(last_partial(), K, GramMatrix<double>{matrix.data(), K});
  return matrix;
}

template <typename G, bool kBulk>
Pass fma_on_host(int first, int other, int stages) {
  return [=](const GramTable& table, double* partial) {
    shim::launch({1, static_cast<unsigned>(table.segments)}, G::kThreads + (kBulk ? 32 : 0),
                 G::shared_bytes(stages), [&](void* shared) {
                   gram_fma_block<G, kBulk>(table, first, other, partial, shared, stages);
                 });
  };
}

template <typename G>
Pass double_on_host(int64_t K) {
  const auto blocks = static_cast<unsigned>((K + G::R - 1) / G::R);
  return [=](const GramTable& table, double* partial) {
    shim::launch({blocks * (blocks + 1) / 2, static_cast<unsigned>(table.segments)}, G::kThreads,
                 G::shared_bytes(0), [&](void* shared) {
                   const BlockPair pair = block_pair(blockIdx.x);
                   gram_fma_block<G, false>(table, pair.a * G::R, pair.b * G::R, partial, shared,
                                            0);
                 });
  };
}

template <typename G>
Pass mma_on_host(int first, int other) {
  return [=](const GramTable& table, double* partial) {
    shim::launch({1, static_cast<unsigned>(table.segments)}, G::kThreads, G::kSharedBytes,
                 [&](void* shared) { gram_mma_block<G>(table, first, other, partial, shared); });
  };
}

// Compares with sums in float64, relative to |g_i| |g_j|. Where these are not finite, the result
// must be the same infinity, or NaN.
inline void check_gram(const RandomGradients& random,
                       const std::function<std::vector<double>(const Gradients&)>& run,
                       double tolerance = 1e-6) {
  const auto K = static_cast<size_t>(random.gradients.n_tasks);
  const std::vector<double> gram = run(random.gradients);
  std::vector<double> exact(K * K, 0.0);
  for (size_t i = 0; i < K; ++i) {
    for (size_t j = 0; j < K; ++j) {
      for (size_t t = 0; t < random.gradients.parameters.size(); ++t) {
        const auto &a = random.values[i][t], &b = random.values[j][t];
        if (a.empty() || b.empty()) continue;
        for (size_t x = 0; x < a.size(); ++x) exact[i * K + j] += a[x] * b[x];
      }
    }
  }
  for (size_t i = 0; i < K; ++i) {
    for (size_t j = 0; j < K; ++j) {
      const double scale = std::sqrt(exact[i * K + i]) * std::sqrt(exact[j * K + j]);
      CHECK(
          close(gram[i * K + j], exact[i * K + j], std::isfinite(scale) ? tolerance * scale : 0) ||
          (!std::isfinite(scale) && std::isfinite(exact[i * K + j]) &&
           close(gram[i * K + j], exact[i * K + j], 1e-3)));
    }
  }
}

}  // namespace taskgroup
