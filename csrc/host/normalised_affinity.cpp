#include "host/normalised_affinity.h"

#include <cmath>

namespace taskgroup {

template <typename scalar_t>
NormalisedAffinity normalise(const scalar_t* affinity, int64_t K) {
  const auto entry = [&](int64_t i, int64_t k) {
    const auto a = static_cast<double>(affinity[i * K + k]);
    return std::isfinite(a) ? a : 0.0;
  };
  NormalisedAffinity result;
  for (int64_t k = 0; k < K; ++k) {
    if (entry(k, k) > 0.0) result.known.push_back(k);
  }
  const auto& known = result.known;
  const auto n = static_cast<int64_t>(known.size());
  result.similarity.resize(n * n);
  for (int64_t i = 0; i < n; ++i) {
    const double own = entry(known[i], known[i]);
    for (int64_t k = 0; k <= i; ++k) {
      const double there = entry(known[i], known[k]) / entry(known[k], known[k]);
      const double back = entry(known[k], known[i]) / own;
      result.similarity[i * n + k] = result.similarity[k * n + i] = (there + back) / 2.0;
    }
  }
  return result;
}

template NormalisedAffinity normalise(const float*, int64_t);
template NormalisedAffinity normalise(const double*, int64_t);

}  // namespace taskgroup
