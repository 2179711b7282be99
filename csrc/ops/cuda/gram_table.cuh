#pragma once

#include <algorithm>
#include <vector>

#include "ops/cuda/elements.cuh"
#include "ops/gradients.h"

namespace taskgroup {

// Parameters of one dtype, passed to a launch by value. They are cut into tiles, which are numbered
// consecutively over all parameters. A segment is a fixed number of consecutive tiles; it is the
// work of one block. Tiles and segments depend only on the sizes, so the sums are the same on every
// GPU.
struct GramTable {
  static constexpr int kMostParameters = 256;
  static constexpr int kMostRows = 3400;

  int64_t numel[kMostParameters];
  int64_t end_tile[kMostParameters];  // one past the last tile of each
  bool aligned[kMostParameters];      // all its pointers, to 16 bytes
  const void* row[kMostRows];         // [parameters, K]; null if a task has no gradient
  int32_t parameters;
  int32_t K;
  int64_t tiles_per_segment;
  int64_t first_segment, segments;  // this launch's range of the segments of all launches

  // The gradient of task k on parameter p, or null.
  template <typename T>
  __device__ const T* gradient(int p, int k) const {
    return k < K ? static_cast<const T*>(row[p * K + k]) : nullptr;
  }
};

static_assert(sizeof(GramTable) <= 32764 - 64, "the parameters of a kernel");

// The index of the sum of tasks i <= j among the K (K + 1) / 2 sums of a segment.
__device__ inline int64_t pair_index(int64_t i, int64_t j, int64_t K) {
  return i * K - i * (i - 1) / 2 + j - i;
}

// Iterates over tiles.
class TileWalk {
 public:
  __device__ TileWalk(const GramTable& table, int64_t tile, int64_t tile_size) : table_(table) {
    p = find(table.end_tile, table.parameters, tile);
    x = (tile - (p == 0 ? 0 : table.end_tile[p - 1])) * tile_size;
  }

  __device__ TileWalk(const GramTable& table, int p, int64_t x) : p(p), x(x), table_(table) {}

  __device__ void next(int64_t tile_size) {
    x += tile_size;
    if (x >= table_.numel[p]) {
      ++p;
      x = 0;
    }
  }

  int p;      // the parameter
  int64_t x;  // the first element of the tile, within the parameter

 private:
  const GramTable& table_;
};

// Every segment has at least `tiles` tiles, so that a block is worth its launch. All launches
// together have at most `most` segments, plus one for each launch.
inline std::vector<GramTable> gram_tables(const Gradients& gradients, Dtype dtype,
                                          int64_t tile_size, int64_t tiles, int64_t most) {
  int64_t all_tiles = 0;
  for (const Parameter& parameter : gradients.parameters) {
    if (parameter.dtype == dtype) all_tiles += (parameter.numel + tile_size - 1) / tile_size;
  }
  const int64_t per_segment = std::max(tiles, (all_tiles + most - 1) / most);
  const auto K = static_cast<int32_t>(gradients.n_tasks);
  std::vector<GramTable> tables;
  for (const Parameter& parameter : gradients.parameters) {
    if (parameter.dtype != dtype || parameter.numel == 0) continue;
    if (tables.empty() || tables.back().parameters == GramTable::kMostParameters ||
        (tables.back().parameters + 1) * K > GramTable::kMostRows) {
      tables.emplace_back();
      tables.back().parameters = 0;
      tables.back().K = K;
      tables.back().tiles_per_segment = per_segment;
    }
    GramTable& table = tables.back();
    const int32_t p = table.parameters++;
    table.numel[p] = parameter.numel;
    table.end_tile[p] =
        (p == 0 ? 0 : table.end_tile[p - 1]) + (parameter.numel + tile_size - 1) / tile_size;
    table.aligned[p] = true;
    std::fill_n(table.row + p * K, K, nullptr);
    for (int64_t i = parameter.begin; i < parameter.end; ++i) {
      table.row[p * K + gradients.all[i].task] = gradients.all[i].data;
      table.aligned[p] &= is_aligned(gradients.all[i].data);
    }
    table.segments = (table.end_tile[p] + per_segment - 1) / per_segment;
  }
  return tables;
}

// Numbers the segments of all launches, and returns their number.
inline int64_t number_segments(std::vector<GramTable>& tables, int64_t first) {
  for (GramTable& table : tables) {
    table.first_segment = first;
    first += table.segments;
  }
  return first;
}

// Loads the elements x, x+1, ... of n, from any address. Elements past the end are zero.
template <typename T, typename Index>
__device__ inline Vector<T> load_ragged(const T* data, Index x, Index n) {
  Vector<T> some = {};
#pragma unroll
  for (int e = 0; e < kPerVector<T>; ++e) {
    if (x + e < n) some.at[e] = data[x + e];
  }
  return some;
}

}  // namespace taskgroup
