#pragma once

#include <vector>

#include "ops/cuda/elements.cuh"
#include "ops/gradients.h"

namespace taskgroup {

// Parameters of one dtype, passed to a launch by value. Tables in pinned host memory would have to
// outlive the launch, which breaks CUDA graphs.
struct CombineTable {
  static constexpr int kMostParameters = 256;
  static constexpr int kMostRows = 2480;

  const void* weights;  // [K] double if wide_weights, else float
  bool wide_weights;
  void* out[kMostParameters];
  int64_t numel[kMostParameters];
  int64_t end_block[kMostParameters];  // one past the last block of each
  int32_t end_row[kMostParameters];    // one past its last row
  bool aligned[kMostParameters];       // all its pointers, to 16 bytes
  const void* row[kMostRows];          // the gradients, parameter by parameter
  uint16_t task[kMostRows];            // of each row
  int32_t parameters;
};

static_assert(sizeof(CombineTable) <= 32764, "the parameters of a kernel");

template <typename T, int kThreads>
constexpr int64_t kCombineChunk = kThreads * 4 * kPerVector<T>;  // elements per block

constexpr int kMostTasks = 1024;  // rows per parameter
constexpr int kRowsAtOnce = 4;    // loads in flight per thread

// Reads an element from all rows before it writes the element, so the output may be one of the
// rows. `shared` has room for the weights of the rows, wide_t<T> [kMostTasks].
template <typename T, int kThreads>
__device__ void combine_block(const CombineTable& table, void* shared) {
  using wide = wide_t<T>;
  constexpr int kWidth = kPerVector<T>;
  const int p = find(table.end_block, table.parameters, blockIdx.x);
  const int64_t block = blockIdx.x - (p == 0 ? 0 : table.end_block[p - 1]);
  const int first_row = p == 0 ? 0 : table.end_row[p - 1];
  const int rows = table.end_row[p] - first_row;
  T* out = static_cast<T*>(table.out[p]);
  const int64_t begin = block * kCombineChunk<T, kThreads>;
  const int64_t left = table.numel[p] - begin;
  const int64_t end =
      begin + (left < kCombineChunk<T, kThreads> ? left : kCombineChunk<T, kThreads>);

  // Convert the weights to the dtype of the sums once, not for every element.
  auto* weights = static_cast<wide*>(shared);
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    const int task = table.task[first_row + r];
    weights[r] = table.wide_weights
                     ? static_cast<wide>(static_cast<const double*>(table.weights)[task])
                     : static_cast<wide>(static_cast<const float*>(table.weights)[task]);
  }
  __syncthreads();

  const auto row = [&](int r) { return static_cast<const T*>(table.row[first_row + r]); };
  int64_t x = begin;
  if (table.aligned[p]) {
    const int64_t whole = begin + (end - begin) / kWidth * kWidth;
    for (x += threadIdx.x * kWidth; x < whole; x += kThreads * kWidth) {
      wide sum[kWidth] = {};
      const auto add = [&](int r, const Words& words) {
        const Vector<T> some = bits_as<Vector<T>>(words);
        const wide weight = weights[r];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) sum[e] += weight * widen(some.at[e]);
      };
      Words some[kRowsAtOnce];
      int r = 0;
      for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) {
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) some[i] = stream_words(row(r + i) + x, true);
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) add(r + i, some[i]);
      }
      // Load the remaining rows together as well.
#pragma unroll
      for (int i = 0; i < kRowsAtOnce - 1; ++i) {
        if (r + i < rows) some[i] = stream_words(row(r + i) + x, true);
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce - 1; ++i) {
        if (r + i < rows) add(r + i, some[i]);
      }
      Vector<T> result;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) result.at[e] = narrow<T>(sum[e]);
      store_vector(out + x, result);
    }
    x = whole;
  }
  for (x += threadIdx.x; x < end; x += kThreads) {
    wide sum = 0;
#pragma unroll 4
    for (int r = 0; r < rows; ++r) sum += weights[r] * widen(row(r)[x]);
    out[x] = narrow<T>(sum);
  }
}

// Puts all parameters of type T into tables and calls launch(table, blocks) with each table. There
// is one output for each of the T parameters.
template <typename T, int kThreads, typename Launch>
void for_each_combine_table(const Gradients& gradients, Dtype dtype,
                            const std::vector<void*>& outputs, const void* weights,
                            bool wide_weights, const Launch& launch) {
  CombineTable table;
  int32_t rows = 0;
  int64_t blocks = 0;
  table.parameters = 0;
  table.weights = weights;
  table.wide_weights = wide_weights;
  const auto flush = [&] {
    if (blocks > 0) launch(table, blocks);
    rows = table.parameters = 0;
    blocks = 0;
  };
  for (size_t t = 0; t < gradients.parameters.size(); ++t) {
    const Parameter& parameter = gradients.parameters[t];
    if (parameter.dtype != dtype || parameter.numel == 0) continue;
    if (table.parameters == CombineTable::kMostParameters ||
        rows + parameter.end - parameter.begin > CombineTable::kMostRows) {
      flush();
    }
    const int32_t p = table.parameters++;
    table.out[p] = outputs[t];
    table.numel[p] = parameter.numel;
    table.aligned[p] = is_aligned(outputs[t]);
    for (int64_t i = parameter.begin; i < parameter.end; ++i) {
      table.row[rows] = gradients.all[i].data;
      table.task[rows++] = static_cast<uint16_t>(gradients.all[i].task);
      table.aligned[p] &= is_aligned(gradients.all[i].data);
    }
    blocks += (parameter.numel + kCombineChunk<T, kThreads> - 1) / kCombineChunk<T, kThreads>;
    table.end_row[p] = rows;
    table.end_block[p] = blocks;
  }
  flush();
}

}  // namespace taskgroup
