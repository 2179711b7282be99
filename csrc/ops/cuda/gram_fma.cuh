#pragma once

// Inner products of few tasks: every thread keeps all the sums of its elements in registers.

#include "ops/cuda/gram_table.cuh"

namespace taskgroup {

// Products that a thread adds up in T before they go to float64, and with the five additions of the
// warp that follow a bound on the rounding error that holds for every input: 13 * 2^-24 of the sum
// of the absolute products.
constexpr int kFmaChain = 16;

constexpr int kMostStages = 4;

// After `steps` halvings.
constexpr int halved(int n, int steps) { return steps == 0 ? n : halved((n + 1) / 2, steps - 1); }

// Adds n values over the lanes of a warp; every lane keeps its share of them, v[0..halved(n, 5)-1].
// In each step two lanes split what they have: n shuffles in all, not 5n.
template <int n, int kMask = 16, typename T>
__device__ inline void add_over_warp(T* v, int lane) {
  constexpr int h = (n + 1) / 2;
  const bool upper = lane & kMask;
#pragma unroll
  for (int i = 0; i < h; ++i) {
    const T low = v[i], high = h + i < n ? v[h + i] : T(0);
    v[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, kMask);
  }
  if constexpr (kMask > 1) add_over_warp<h, kMask / 2>(v, lane);
}

// Which of n values the share of a lane is.
struct Share {
  int begin, count;
};

__device__ inline Share share_of_lane(int n, int lane) {
  Share share = {0, n};
  for (int mask = 16; mask > 0; mask /= 2) {
    const int h = (n + 1) / 2;
    if (lane & mask) {
      share.begin += h;
      share.count = share.count > h ? share.count - h : 0;
    } else {
      share.count = share.count < h ? share.count : h;
    }
    n = h;
  }
  return share;
}

// The sums of R tasks from `first` on with one another (kTriangle), or with R from `other` on.
template <typename T_, int R_, bool kTriangle_, int kThreads_>
struct GramFma {
  using T = T_;
  static constexpr int R = R_, kThreads = kThreads_, kWarps = kThreads / 32;
  static constexpr bool kTriangle = kTriangle_;
  static constexpr int kSums = kTriangle ? R * (R + 1) / 2 : R * R;
  static constexpr int kShare = halved(kSums, 5);
  static constexpr int kTile = kThreads * kPerVector<T>;  // elements
  static constexpr int kTilesOfChain = kFmaChain / kPerVector<T>;

  static constexpr size_t kBarrierBytes = 128;  // the barriers, and what is ahead
  static constexpr size_t kStageBytes = R * kTile * sizeof(T);
  static constexpr size_t shared_bytes(int stages) {
    const size_t sums = kWarps * kSums * sizeof(double), ring = stages * kStageBytes;
    return kBarrierBytes + (sums > ring ? sums : ring);
  }
};

// What thread 0 is to fetch next; in shared memory, since registers are scarce.
struct Ahead {
  int64_t tile, x;
  int p, stage;
};

// One segment. Where kBulk the copy engine fetches whole aligned tiles into a ring of stages ahead
// of their use: the registers are full of sums, too few blocks fit for loads to hide their latency.
template <typename G, bool kBulk>
__device__ void gram_fma_block(const GramTable& table, int first, int other, double* partial,
                               void* shared, int stages) {
  using T = typename G::T;
  constexpr int R = G::R;
  static_assert(!kBulk || G::kTriangle, "");
  auto* barrier = static_cast<uint64_t*>(shared);  // [kMostStages]
  auto* ahead = reinterpret_cast<Ahead*>(barrier + kMostStages);
  auto* body = static_cast<unsigned char*>(shared) + G::kBarrierBytes;
  auto* ring = reinterpret_cast<T*>(body);       // [stages, R, kTile]
  auto* sums = reinterpret_cast<double*>(body);  // [kWarps, kSums], when the ring is done
  const int lane = threadIdx.x % 32;
  const int64_t all = table.end_tile[table.parameters - 1];
  const int64_t begin = blockIdx.y * table.tiles_per_segment;
  const int64_t end = begin + table.tiles_per_segment < all ? begin + table.tiles_per_segment : all;

  const auto in_ring = [&](const TileWalk& at) {
    return kBulk && table.aligned[at.p] && at.x + G::kTile <= table.numel[at.p];
  };
  // Thread 0 asks for the next tile that goes through the ring, if there is one.
  const auto fill = [&] {
    int64_t tile = ahead->tile;
    TileWalk at(table, ahead->p, ahead->x);
    while (tile < end && !in_ring(at)) {
      if (++tile < end) at.next(G::kTile);
    }
    if (tile < end) {
      const int stage = ahead->stage;
      uint32_t rows = 0;
      for (int r = 0; r < R; ++r) rows += table.gradient<T>(at.p, first + r) != nullptr;
      mbarrier_expect(barrier + stage, rows * G::kTile * sizeof(T));
      for (int r = 0; r < R; ++r) {
        const T* from = table.gradient<T>(at.p, first + r);
        if (from == nullptr) continue;
        bulk_copy(ring + (stage * R + r) * G::kTile, from + at.x, G::kTile * sizeof(T),
                  barrier + stage);
      }
      ahead->stage = stage + 1 == stages ? 0 : stage + 1;
      if (++tile < end) at.next(G::kTile);
    }
    ahead->tile = tile;
    ahead->p = at.p;
    ahead->x = at.x;
  };
  if (kBulk) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < stages; ++s) mbarrier_init(barrier + s);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const TileWalk start(table, begin, G::kTile);
      *ahead = {begin, start.x, start.p, 0};
      for (int s = 0; s < stages; ++s) fill();
    }
  }

  T sum[G::kSums] = {};
  double total[G::kShare] = {};
  const auto flush = [&] {
    add_over_warp<G::kSums>(sum, lane);
#pragma unroll
    for (int i = 0; i < G::kShare; ++i) total[i] += sum[i];
#pragma unroll
    for (int i = 0; i < G::kSums; ++i) sum[i] = 0;
  };

  int stage = 0, tiles_of_chain = 0;
  uint32_t parity = 0;
  TileWalk at(table, begin, G::kTile);
  for (int64_t tile = begin; tile < end; ++tile) {
    Vector<T> a[R], b[G::kTriangle ? 1 : R];
    if (in_ring(at)) {
      mbarrier_wait(barrier + stage, parity);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        a[r] = {};
        if (table.gradient<T>(at.p, first + r) != nullptr) {
          a[r] = load_vector(ring + (stage * R + r) * G::kTile + threadIdx.x * kPerVector<T>);
        }
      }
      __syncthreads();  // all have read: the stage is free again
      if (threadIdx.x == 0) fill();
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    } else {
      const int64_t x = at.x + threadIdx.x * kPerVector<T>, n = table.numel[at.p];
      const bool whole = table.aligned[at.p] && x + kPerVector<T> <= n;
      const auto load = [&](int task) {
        const T* data = table.gradient<T>(at.p, task);
        if (data == nullptr) return Vector<T>{};
        return whole ? load_vector(data + x) : load_ragged(data, x, n);
      };
#pragma unroll
      for (int r = 0; r < R; ++r) {
        a[r] = load(first + r);
        if (!G::kTriangle) b[r] = load(other + r);
      }
    }
#pragma unroll
    for (int e = 0; e < kPerVector<T>; ++e) {
      int s = 0;
#pragma unroll
      for (int i = 0; i < R; ++i) {
#pragma unroll
        for (int j = G::kTriangle ? i : 0; j < R; ++j) {
          sum[s++] += a[i].at[e] * (G::kTriangle ? a[j].at[e] : b[j].at[e]);
        }
      }
    }
    if (++tiles_of_chain == G::kTilesOfChain) {
      flush();
      tiles_of_chain = 0;
    }
    if (tile + 1 < end) at.next(G::kTile);
  }
  if (tiles_of_chain > 0) flush();

  const Share share = share_of_lane(G::kSums, lane);
#pragma unroll
  for (int i = 0; i < G::kShare; ++i) {
    if (i < share.count) sums[threadIdx.x / 32 * G::kSums + share.begin + i] = total[i];
  }
  __syncthreads();
  const int64_t K = table.K;
  partial += (table.first_segment + blockIdx.y) * (K * (K + 1) / 2);
  for (int s = threadIdx.x; s < G::kSums; s += G::kThreads) {
    double result = 0;
    for (int w = 0; w < G::kWarps; ++w) result += sums[w * G::kSums + s];
    int i = 0, j = s;
    while (j >= (G::kTriangle ? R - i : R)) {
      j -= G::kTriangle ? R - i : R;
      ++i;
    }
    if (G::kTriangle) j += i;
    i += first;
    j += G::kTriangle ? first : other;
    if (i <= j && j < K) partial[pair_index(i, j, K)] = result;
  }
}

// Blocks a <= b of R tasks, the y-th of all pairs of them.
struct BlockPair {
  int a, b;
};

__device__ inline BlockPair block_pair(int y) {
  int b = 0;
  while (y > b) y -= ++b;
  return {y, b};
}

}  // namespace taskgroup
