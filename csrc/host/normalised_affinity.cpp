#include "host/normalised_affinity.h"

#include <algorithm>
#include <cmath>

namespace taskgroup {

namespace {

constexpr int64_t kTile = 32;

}  // namespace

template <typename scalar_t>
NormalisedAffinity normalise(const scalar_t* affinity, int64_t K) {
  const auto entry = [&](int64_t i, int64_t k) {
    const auto a = static_cast<double>(affinity[i * K + k]);
    return std::isfinite(a) ? a : 0.0;
  };
  NormalisedAffinity result;
  result.complete =
      std::all_of(affinity, affinity + K * K, [](scalar_t a) { return std::isfinite(a); });
  for (int64_t k = 0; k < K; ++k) {
    if (entry(k, k) > 0.0) result.known.push_back(k);
  }
  const auto& known = result.known;
  const auto n = static_cast<int64_t>(known.size());
  auto& x = result.similarity;
  x.resize(n * n);
  std::vector<double> own(n);
  for (int64_t k = 0; k < n; ++k) own[k] = entry(known[k], known[k]);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < n; ++k) x[i * n + k] = entry(known[i], known[k]) / own[k];
  }
  // Compute it in tiles, so that rows and columns stay in the cache until they are no longer
  // needed.
  for (int64_t i0 = 0; i0 < n; i0 += kTile) {
    for (int64_t k0 = 0; k0 <= i0; k0 += kTile) {
      for (int64_t i = i0; i < std::min(i0 + kTile, n); ++i) {
        for (int64_t k = k0; k < std::min(k0 + kTile, i + 1); ++k) {
          x[i * n + k] = x[k * n + i] = (x[i * n + k] + x[k * n + i]) / 2.0;
        }
      }
    }
  }
  return result;
}

template NormalisedAffinity normalise(const float*, int64_t);
template NormalisedAffinity normalise(const double*, int64_t);

}  // namespace taskgroup
