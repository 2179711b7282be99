#pragma once

#include <cstdint>
#include <functional>

#include "ops/gradients.h"

struct CUstream_st;

namespace taskgroup {

// The inner products have one of two uses. Either they are written to a matrix:
template <typename T>
struct GramMatrix {
  T* matrix;  // [K, K]
  int64_t K;
};

// Or they update an affinity matrix:
struct GramAffinity {
  float* matrix;  // [K, K], where K counts all tasks
  int64_t K;
  const void* losses;  // [K] double if wide_losses, else float
  bool wide_losses;
  double decay, lr;
  int32_t* observed;     // [K, K] or null: the number of observations of each entry
  uint16_t tasks[1024];  // row and column of each measured task
};

// Launches all kernels on the stream: one or more that read the gradients, and one that adds the
// partial sums and writes the result. No gradient may be `strided`. allocate(n) returns n doubles
// of scratch memory.
using Allocate = std::function<double*(int64_t n)>;
void gram(const Gradients& gradients, const Allocate& allocate, CUstream_st* stream,
          const GramMatrix<float>& result);
void gram(const Gradients& gradients, const Allocate& allocate, CUstream_st* stream,
          const GramMatrix<double>& result);
void gram(const Gradients& gradients, const Allocate& allocate, CUstream_st* stream,
          const GramAffinity& result);

}  // namespace taskgroup
