#pragma once

// The second pass: adds the partial sums of all segments, in order, and writes the result.

#include "ops/cuda/affinity_update_kernel.cuh"
#include "ops/cuda/gram.h"
#include "ops/cuda/gram_table.cuh"

namespace taskgroup {

template <typename T>
__device__ inline void store(const GramMatrix<T>& to, int64_t i, int64_t j, double product) {
  to.matrix[i * to.K + j] = to.matrix[j * to.K + i] = static_cast<T>(product);
}

__device__ inline void observe(const GramAffinity& to, int64_t i, int64_t k, double product) {
  const double loss = to.wide_losses ? static_cast<const double*>(to.losses)[k]
                                     : static_cast<const float*>(to.losses)[k];
  if (!(isfinite(product) && isfinite(loss) && loss > 0.0)) return;
  float& entry = to.matrix[i * to.K + k];
  entry = blend(entry, to.lr * product / loss, to.decay);
  if (to.observed != nullptr) ++to.observed[i * to.K + k];
}

__device__ inline void store(const GramAffinity& to, int64_t i, int64_t j, double product) {
  observe(to, to.tasks[i], to.tasks[j], product);
  if (i != j) observe(to, to.tasks[j], to.tasks[i], product);
}

// Computes 32 entries of row blockIdx.y, starting at column 32 * blockIdx.x. Each lane sums one
// column, and the segments are divided among the warps.
template <int kThreads, typename Result>
__device__ void gram_finish_block(const double* partial, int64_t segments, int64_t K,
                                  const Result& result, void* shared) {
  constexpr int kWarps = kThreads / 32;
  auto* sums = static_cast<double*>(shared);  // [kWarps, 32]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t i = blockIdx.y, j = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const bool mine = i <= j && j < K;
  double sum = 0;
  if (mine) {
    const int64_t pairs = K * (K + 1) / 2;
    const double* at = partial + pair_index(i, j, K);
    constexpr int kAtOnce = 16;  // loads in flight; they are added in order
    const double* from = at + warp * pairs;
    const int64_t step = kWarps * pairs;
#pragma unroll 1
    for (int left = (static_cast<int>(segments) - warp + kWarps - 1) / kWarps; left > 0;
         left -= kAtOnce) {
      double some[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        some[i] = load_double(from, i < left);
        from += step;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += some[i];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || !mine) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + lane];
  store(result, i, j, sum);
}

}  // namespace taskgroup
