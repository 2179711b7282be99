#pragma once

#include <cstdint>
#include <vector>

// The gradients of K tasks on T parameters, as addresses, sizes and strides. This header does not
// need torch, so the kernels and their tests do not either.

namespace taskgroup {

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

struct Gradient {
  const void* data;
  int32_t task;            // 0..K-1
  const int64_t* strides;  // [dim], in elements; used if the parameter is `strided`
};

struct Parameter {
  int64_t numel;
  Dtype dtype;
  // If false, all gradients hold their elements without gaps and in the same order, so that the
  // same offset is the same element in all of them. If true, kernels must use the strides.
  bool strided;
  int32_t dim;
  const int64_t* sizes;  // [dim]
  int64_t begin, end;    // its gradients, in Gradients::all, by ascending task
};

struct Gradients {
  int64_t n_tasks = 0;
  std::vector<Parameter> parameters;
  std::vector<Gradient> all;
  std::vector<int64_t> shapes;  // `sizes` and `strides` point into it
};

}  // namespace taskgroup
