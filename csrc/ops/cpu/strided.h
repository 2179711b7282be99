#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops/gradients.h"

namespace taskgroup {

// Calls run(offset, stride, count) for runs of evenly spaced elements of a tensor with these sizes
// and strides. The runs cover n elements in the order of the indices, starting at element `begin`.
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

// Copies n elements in the order of the indices, starting at element `begin`.
template <typename raw_t>
void copy_elements(const Parameter& parameter, const Gradient& gradient, int64_t begin, int64_t n,
                   raw_t* to) {
  const auto* data = static_cast<const raw_t*>(gradient.data);
  if (!parameter.strided) {
    std::copy(data + begin, data + begin + n, to);
    return;
  }
  for_each_run(parameter.sizes, gradient.strides, parameter.dim, begin, n,
               [&](int64_t offset, int64_t stride, int64_t count) {
                 for (int64_t x = 0; x < count; ++x) *to++ = data[offset + x * stride];
               });
}

}  // namespace taskgroup
