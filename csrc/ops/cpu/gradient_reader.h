#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "ops/cpu/gradient_loops.h"
#include "ops/gradients.h"

namespace taskgroup {

// Calls run(offset, stride, count) for the runs of evenly spaced elements that make up n elements,
// from element `begin` on in the order of the indices, of a tensor with these sizes and strides.
template <typename Run>
void for_each_run(const int64_t* sizes, const int64_t* strides, int32_t dim, int64_t begin,
                  int64_t n, const Run& run) {
  if (dim == 0) {
    run(int64_t{0}, int64_t{1}, n);
    return;
  }
  std::vector<int64_t> index(dim);
  int64_t offset = 0;
  for (int32_t d = dim - 1; d >= 0; --d) {
    index[d] = begin % sizes[d];
    begin /= sizes[d];
    offset += index[d] * strides[d];
  }
  while (n > 0) {
    const int64_t count = std::min(n, sizes[dim - 1] - index[dim - 1]);
    run(offset, strides[dim - 1], count);
    n -= count;
    index[dim - 1] += count;
    offset += count * strides[dim - 1];
    for (int32_t d = dim - 1; d > 0 && index[d] == sizes[d]; --d) {
      offset += strides[d - 1] - sizes[d] * strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Reads gradients piece by piece as the type that is computed in: float, or double for float64.
template <typename T>
class GradientReader {
 public:
  GradientReader(const GradientLoops& loops, int64_t longest) : loops_(loops), raw_(longest) {}

  // Whether the elements can be used where they lie.
  static bool in_place(const Parameter& parameter) {
    return !parameter.strided &&
           (parameter.dtype == Dtype::kFloat || parameter.dtype == Dtype::kDouble);
  }

  // Copies n elements from `begin` on to `to`.
  void copy(const Parameter& parameter, const Gradient& gradient, int64_t begin, int64_t n, T* to) {
    if constexpr (std::is_same_v<T, float>) {
      if (parameter.dtype != Dtype::kFloat) {
        const uint16_t* raw = pick(parameter, gradient, begin, n, raw_.data());
        (parameter.dtype == Dtype::kHalf ? loops_.widen_half : loops_.widen_bfloat16)(raw, n, to);
        return;
      }
    }
    const T* from = pick(parameter, gradient, begin, n, to);
    if (from != to) std::copy(from, from + n, to);
  }

 private:
  template <typename raw_t>
  static const raw_t* pick(const Parameter& parameter, const Gradient& gradient, int64_t begin,
                           int64_t n, raw_t* buffer) {
    const auto* data = static_cast<const raw_t*>(gradient.data);
    if (!parameter.strided) return data + begin;
    raw_t* to = buffer;
    for_each_run(parameter.sizes, gradient.strides, parameter.dim, begin, n,
                 [&](int64_t offset, int64_t stride, int64_t count) {
                   for (int64_t x = 0; x < count; ++x) *to++ = data[offset + x * stride];
                 });
    return buffer;
  }

  const GradientLoops& loops_;
  std::vector<uint16_t> raw_;
};

}  // namespace taskgroup
