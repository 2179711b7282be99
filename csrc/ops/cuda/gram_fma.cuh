#pragma once

// Inner products of few tasks. Every thread keeps the sums of its own elements in registers.

#include "ops/cuda/gram_table.cuh"

namespace taskgroup {

// The number of products that a thread adds in T before the sums are converted to float64. Together
// with the five additions over the warp that follow, it bounds the rounding error for every input
// by 13 * 2^-24 times the sum of the absolute products.
constexpr int kFmaChain = 16;

constexpr int kMostStages = 4;

// The number of values left after `steps` halvings.
constexpr int halved(int n, int steps) { return steps == 0 ? n : halved((n + 1) / 2, steps - 1); }

// Adds n values over the lanes of a warp. Afterwards every lane holds its share of the n sums in
// v[0..halved(n, 5)-1]. In each step two lanes split their values, so that about n shuffles are
// needed instead of 5n.
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

// The range of the n values that a lane's share holds.
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

// The inner products of R tasks, starting at `first`, with each other (kTriangle) or with the R
// tasks that start at `other`.
template <typename T_, int R_, bool kTriangle_, int kThreads_>
struct GramFma {
  using T = T_;
  static constexpr int R = R_, kThreads = kThreads_, kWarps = kThreads / 32;
  static constexpr bool kTriangle = kTriangle_;
  static constexpr int kSums = kTriangle ? R * (R + 1) / 2 : R * R;
  static constexpr int kShare = halved(kSums, 5);
  static constexpr int kTile = kThreads * kPerVector<T>;  // elements
  static constexpr int kTilesOfChain = kFmaChain / kPerVector<T>;

  static constexpr size_t kBarrierBytes = 128;  // the barriers, and which rows each stage holds
  static constexpr size_t kStageBytes = R * kTile * sizeof(T);
  static constexpr size_t shared_bytes(int stages) {
    const size_t sums = kWarps * kSums * sizeof(double), ring = stages * kStageBytes;
    return kBarrierBytes + (sums > ring ? sums : ring);
  }
};

// A ring of stages in shared memory. One warp tells the copy engine to fill the stages with whole,
// aligned tiles, and the other warps read them. The barrier `full` completes when all rows of a
// stage have arrived, and `empty` completes when all warps have read them.
template <typename G>
class Ring {
 public:
  using T = typename G::T;
  static_assert(kMostStages * (2 * sizeof(uint64_t) + sizeof(uint32_t)) <= G::kBarrierBytes, "");

  __device__ Ring(void* shared, int stages)
      : full(static_cast<uint64_t*>(shared)),
        empty(full + kMostStages),
        present(reinterpret_cast<uint32_t*>(empty + kMostStages)),
        rows_(reinterpret_cast<T*>(static_cast<unsigned char*>(shared) + G::kBarrierBytes)),
        stages_(stages) {}

  __device__ T* row(int r) const { return rows_ + (stage * G::R + r) * G::kTile; }

  __device__ void next() {
    if (++stage == stages_) {
      stage = 0;
      parity ^= 1;
    }
  }

  uint64_t* full;     // [kMostStages]
  uint64_t* empty;    // [kMostStages]
  uint32_t* present;  // [kMostStages], a bit for each row that is present
  int stage = 0;
  uint32_t parity = 0;

 private:
  T* rows_;  // [stages, R, kTile]
  int stages_;
};

// Adds the products of the tasks that have a gradient on this parameter. The others are left out,
// because the product of their zeros with infinity would be NaN. The lowest bits of `absent` mark
// left tasks without a gradient, and the next higher bits mark right tasks.
template <typename G>
__device__ inline void add_present(typename G::T* sum,                  // [kSums]
                                   const Vector<typename G::T>* left,   // [R]
                                   const Vector<typename G::T>* right,  // [R]
                                   uint32_t absent) {
  const uint32_t absent_right = G::kTriangle ? absent : absent >> G::R;
#pragma unroll 1
  for (int i = 0; i < G::R; ++i) {
#pragma unroll 1
    for (int j = G::kTriangle ? i : 0; j < G::R; ++j, ++sum) {
      if ((absent >> i | absent_right >> j) & 1) continue;
      for (int e = 0; e < kPerVector<typename G::T>; ++e) *sum += left[i].at[e] * right[j].at[e];
    }
  }
}

template <typename G>
__device__ inline bool in_ring(const GramTable& table, const TileWalk& at) {
  return table.aligned[at.p] && at.x + G::kTile <= table.numel[at.p];
}

// One warp copies the tiles of a segment into the ring. Lane r requests row r.
template <typename G>
__device__ void fill_ring(const GramTable& table, int first, int64_t begin, int64_t end,
                          Ring<G> ring, int stages) {
  constexpr uint32_t kRowBytes = G::kTile * sizeof(typename G::T);
  const int lane = threadIdx.x % 32;
  const typename G::T* row = nullptr;
  uint32_t present = 0;
  int p = -1;  // the parameter whose rows these are
  TileWalk at(table, begin, G::kTile);
  for (int64_t tile = begin; tile < end; ++tile) {
    if (at.p != p) {
      p = at.p;
      row = lane < G::R ? table.gradient<typename G::T>(p, first + lane) : nullptr;
      present = __ballot_sync(~0u, row != nullptr);
    }
    if (in_ring<G>(table, at)) {
      mbarrier_wait(ring.empty + ring.stage, ring.parity ^ 1);
      if (lane == 0) {
        ring.present[ring.stage] = present;
        mbarrier_expect(ring.full + ring.stage, __popc(present) * kRowBytes);
      }
      __syncwarp();
      if (row != nullptr) {
        bulk_copy(ring.row(lane), row + at.x, kRowBytes, ring.full + ring.stage);
      }
      ring.next();
    }
    if (tile + 1 < end) at.next(G::kTile);
  }
  // Waits until all stages have been read; no thread uses the barriers after this.
  for (int s = 0; s < stages; ++s, ring.next()) {
    mbarrier_wait(ring.empty + ring.stage, ring.parity ^ 1);
  }
}

// Sums one segment. With kBulk, one more warp after the first kThreads threads fills the ring.
// Plain loads would be slow: the sums need so many registers that too few warps fit on a
// multiprocessor to hide the latency.
template <typename G, bool kBulk>
__device__ void gram_fma_block(const GramTable& table, int first, int other, double* partial,
                               void* shared, int stages) {
  using T = typename G::T;
  constexpr int R = G::R;
  static_assert(!kBulk || G::kTriangle, "");
  const int lane = threadIdx.x % 32;
  const int64_t all = table.end_tile[table.parameters - 1];
  const int64_t begin = blockIdx.y * table.tiles_per_segment;
  const int64_t end = begin + table.tiles_per_segment < all ? begin + table.tiles_per_segment : all;
  Ring<G> ring(shared, stages);
  if constexpr (kBulk) {
    // The rows of missing tasks stay zero.
    for (int s = 0; s < stages; ++s, ring.next()) {
      for (int r = table.K - first; r < R; ++r) {
        for (int x = threadIdx.x; x < G::kTile; x += G::kThreads + 32) ring.row(r)[x] = 0;
      }
      if (threadIdx.x == 0) {
        mbarrier_init(ring.full + s, 1);
        mbarrier_init(ring.empty + s, G::kWarps);
      }
    }
    ring = Ring<G>(shared, stages);
    __syncthreads();
  }
  const bool fills = kBulk && threadIdx.x >= G::kThreads;
  if (fills) fill_ring<G>(table, first, begin, end, ring, stages);

  T sum[G::kSums] = {};
  double total[G::kShare] = {};
  const auto flush = [&] {
    add_over_warp<G::kSums>(sum, lane);
#pragma unroll
    for (int i = 0; i < G::kShare; ++i) total[i] += sum[i];
#pragma unroll
    for (int i = 0; i < G::kSums; ++i) sum[i] = 0;
  };

  int tiles_of_chain = 0;
  TileWalk at(table, begin, G::kTile);
  for (int64_t tile = begin; tile < end && !fills; ++tile) {
    Vector<T> a[R], b[G::kTriangle ? 1 : R];
    // A bit for each task without a gradient on this parameter. The lowest bits are those of `a`,
    // the next ones those of `b`. Tasks past the last one have no bit.
    uint32_t absent = 0;
    if (kBulk && in_ring<G>(table, at)) {
      mbarrier_wait(ring.full + ring.stage, ring.parity);
      absent = ~ring.present[ring.stage] & ((1u << (table.K - first)) - 1);
#pragma unroll
      for (int r = 0; r < R; ++r) a[r] = load_vector(ring.row(r) + threadIdx.x * kPerVector<T>);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.empty + ring.stage);
      ring.next();
    } else {
      const int64_t x = at.x + threadIdx.x * kPerVector<T>, n = table.numel[at.p];
      const bool whole = table.aligned[at.p] && x + kPerVector<T> <= n;
      const auto load = [&](Vector<T>(&rows)[R], int task, int bit) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const bool is_absent = task + r < table.K && table.gradient<T>(at.p, task + r) == nullptr;
          absent |= static_cast<uint32_t>(is_absent) << (bit + r);
        }
        if (whole) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const T* data = table.gradient<T>(at.p, task + r);
            rows[r] = bits_as<Vector<T>>(stream_words(data + x, data != nullptr));
          }
        } else {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const T* data = table.gradient<T>(at.p, task + r);
            rows[r] = data == nullptr ? Vector<T>{} : load_ragged(data, x, n);
          }
        }
      };
      load(a, first, 0);
      if constexpr (!G::kTriangle) load(b, other, R);
    }
    bool added = false;
    if (absent != 0) {
      T probe = 0;  // NaN if one of the numbers is not finite
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (absent >> r & 1) a[r] = {};  // its row in the ring is from an older tile
#pragma unroll
        for (int e = 0; e < kPerVector<T>; ++e) {
          probe += T(0) * a[r].at[e];
          if constexpr (!G::kTriangle) probe += T(0) * b[r].at[e];
        }
      }
      if (!(probe == T(0))) {
        T own[G::kSums];
        Vector<T> left[R], right[G::kTriangle ? 1 : R];
        for (int i = 0; i < G::kSums; ++i) own[i] = sum[i];
        for (int r = 0; r < R; ++r) left[r] = a[r];
        if constexpr (!G::kTriangle) {
          for (int r = 0; r < R; ++r) right[r] = b[r];
        }
        add_present<G>(own, left, G::kTriangle ? left : right, absent);
        for (int i = 0; i < G::kSums; ++i) sum[i] = own[i];
        added = true;
      }
    }
    if (!added) {
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
    }
    if (++tiles_of_chain == G::kTilesOfChain) {
      flush();
      tiles_of_chain = 0;
    }
    if (tile + 1 < end) at.next(G::kTile);
  }
  if (tiles_of_chain > 0) flush();

  // [kWarps, kSums], in the memory of the ring
  auto* sums = reinterpret_cast<double*>(static_cast<unsigned char*>(shared) + G::kBarrierBytes);
  if (kBulk) __syncthreads();
  const Share share = share_of_lane(G::kSums, lane);
#pragma unroll
  for (int i = 0; i < G::kShare; ++i) {
    if (i < share.count && !fills) sums[threadIdx.x / 32 * G::kSums + share.begin + i] = total[i];
  }
  __syncthreads();
  const int64_t K = table.K;
  partial += (table.first_segment + blockIdx.y) * (K * (K + 1) / 2);
  for (int s = threadIdx.x; s < G::kSums; s += blockDim.x) {
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

// The y-th of all pairs a <= b of blocks of R tasks.
struct BlockPair {
  int a, b;
};

__device__ inline BlockPair block_pair(int y) {
  int b = 0;
  while (y > b) y -= ++b;
  return {y, b};
}

}  // namespace taskgroup
