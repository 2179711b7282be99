#pragma once

// The second pass: adds the partial sums of all segments, in their order, and uses them.

#include "ops/cuda/affinity_update_kernel.cuh"
#include "ops/cuda/gram_table.cuh"

namespace taskgroup {

// The matrix of inner products.
template <typename T>
struct GramMatrix {
  T* matrix;  // [K, K]
  int64_t K;

  __device__ void store(int64_t i, int64_t j, double product) const {
    matrix[i * K + j] = matrix[j * K + i] = static_cast<T>(product);
  }
};

// The update of the affinity matrix.
struct GramAffinity {
  float* matrix;  // [K, K], K of all tasks
  int64_t K;
  const void* losses;  // [K] double if wide_losses, else float
  bool wide_losses;
  double decay, lr;
  uint16_t tasks[1024];  // row and column of each measured task

  __device__ void store(int64_t i, int64_t j, double product) const {
    observe(tasks[i], tasks[j], product);
    if (i != j) observe(tasks[j], tasks[i], product);
  }

  __device__ void observe(int64_t i, int64_t k, double product) const {
    const double loss =
        wide_losses ? static_cast<const double*>(losses)[k] : static_cast<const float*>(losses)[k];
    if (!(isfinite(product) && isfinite(loss) && loss > 0.0)) return;
    float& entry = matrix[i * K + k];
    entry = blend(entry, lr * product / loss, decay);
  }
};

// Row blockIdx.y, columns from 32 blockIdx.x on: a column per lane, the segments dealt to the warps.
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
#pragma unroll 4
    for (int64_t s = warp; s < segments; s += kWarps) sum += at[s * pairs];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || !mine) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + lane];
  result.store(i, j, sum);
}

}  // namespace taskgroup
