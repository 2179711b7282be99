#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops/gradients.h"

namespace taskgroup {

// The elements of all parameters, one parameter after the other, cut into parts of equal size. That
// size depends only on the sizes of the parameters, so sums that are computed part by part do not
// depend on the number of threads.
class Parts {
 public:
  static constexpr int64_t kStep = 512;  // elements; parts are multiples of it

  Parts(const std::vector<Parameter>& parameters, int64_t least, int64_t most)
      : parameters_(parameters) {
    for (const Parameter& parameter : parameters) {
      starts_.push_back(starts_.back() + parameter.numel);
    }
    const int64_t parts = std::clamp<int64_t>(starts_.back() / least, 1, most);
    size_ = std::max(kStep, ((starts_.back() + parts - 1) / parts + kStep - 1) / kStep * kStep);
  }

  int64_t count() const { return (starts_.back() + size_ - 1) / size_; }

  // Calls piece(t, begin, end) for the elements of each parameter t that lie in this part.
  template <typename Piece>
  void for_each_piece(int64_t part, const Piece& piece) const {
    const int64_t begin = part * size_, end = std::min(starts_.back(), begin + size_);
    const auto after = std::upper_bound(starts_.begin(), starts_.end(), begin);
    for (size_t t = after - starts_.begin() - 1; starts_[t] < end; ++t) {
      const int64_t from = std::max(begin, starts_[t]) - starts_[t];
      const int64_t to = std::min(end, starts_[t + 1]) - starts_[t];
      if (from < to) piece(t, from, to);
    }
  }

 private:
  const std::vector<Parameter>& parameters_;
  std::vector<int64_t> starts_ = {0};
  int64_t size_;
};

}  // namespace taskgroup
