#pragma once

#include "ops/cuda/intrinsics.cuh"

namespace taskgroup {

// (1 - decay) old + decay seen, rounded as on the CPU.
__device__ inline float blend(float old, double seen, double decay) {
  return static_cast<float>(
      add(multiply(1.0 - decay, static_cast<double>(old)), multiply(decay, seen)));
}

// The observed effect of task i on task k of the same group, from their ratios ri and rk. NaN,
// which means no observation, if either ratio is NaN.
__device__ inline double observe_inside(double ri, double rk, bool same_task) {
  if (same_task) return ri >= 0.0 ? ri : NAN;
  const double product = ri * rk;
  if (product >= 0.0) return rk;
  return product < 0.0 ? -(ri < rk ? rk : ri) : NAN;
}

// The rows are divided among the blocks, and every block computes all ratios. A block may have any
// number of threads. `ratio` is [K] in shared memory.
template <typename scalar_t>
__device__ void affinity_update_block(float* matrix,           // [K, K]
                                      const scalar_t* before,  // [K]
                                      const scalar_t* after,   // [K]
                                      const bool* mask,        // [K]
                                      int64_t K, double decay, double* ratio,
                                      int32_t* observed) {  // [K, K] or null
  int in_group = 0;
  bool stepped = false;
  // Every thread runs every iteration, because all threads synchronise in it.
  for (int64_t first = 0; first < K; first += blockDim.x) {
    const int64_t k = first + threadIdx.x;
    in_group += __syncthreads_count(k < K && mask[k]);
  }
  for (int64_t first = 0; first < K; first += blockDim.x) {
    const int64_t k = first + threadIdx.x;
    bool moved = false;
    if (k < K) {
      const double b = before[k], a = after[k];
      ratio[k] = NAN;
      if (isfinite(b) && b > 0.0 && isfinite(a)) {
        moved = a != b;
        const double gain = 1.0 - a / b;
        ratio[k] = (gain < -1.0 ? -1.0 : gain > 1.0 ? 1.0 : gain) / in_group;
      }
    }
    stepped |= __syncthreads_count(moved) > 0;
  }
  // If no loss has changed at all, there was no step.
  if (!stepped) return;

  for (int64_t i = blockIdx.x; i < K; i += gridDim.x) {
    if (!mask[i]) continue;
    for (int64_t k = threadIdx.x; k < K; k += blockDim.x) {
      const double seen = mask[k] ? observe_inside(ratio[i], ratio[k], i == k) : ratio[k];
      if (isnan(seen)) continue;
      matrix[i * K + k] = blend(matrix[i * K + k], seen, decay);
      if (observed != nullptr) ++observed[i * K + k];
    }
  }
}

}  // namespace taskgroup
