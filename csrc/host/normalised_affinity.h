#pragma once

#include <cstdint>
#include <vector>

namespace taskgroup {

struct NormalisedAffinity {
  std::vector<int64_t> known;  // [n], ascending: the tasks k with A[k, k] > 0
  std::vector<double>
      similarity;        // [n, n] over `known`: (A[i, k] / A[k, k] + A[k, i] / A[i, i]) / 2
  bool complete = true;  // whether all entries of A are finite
};

// Makes an affinity comparable between tasks and symmetric. Entries that are not finite count as
// zero.
template <typename scalar_t>
NormalisedAffinity normalise(const scalar_t* affinity,  // [K, K] row-major
                             int64_t K);

}  // namespace taskgroup
