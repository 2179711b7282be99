#pragma once

// This file does not use torch: the module of the host includes it as well.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace taskgroup {

// The observed effect of task i on task k of the same group, from their ratios ri and rk. NaN,
// which means no observation, if either ratio is NaN.
inline double observe_inside(double ri, double rk, bool same_task) {
  constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();
  if (same_task) return ri >= 0.0 ? ri : kNothing;
  const double product = ri * rk;
  if (product >= 0.0) return rk;
  return product < 0.0 ? -std::max(ri, rk) : kNothing;
}

template <typename scalar_t>
void update_affinity(float* matrix,           // [K, K]
                     const scalar_t* before,  // [K]
                     const scalar_t* after,   // [K]
                     const bool* mask,        // [K]
                     int64_t K, double decay,
                     int32_t* observed) {  // [K, K] or null
  const auto group_size = static_cast<double>(std::count(mask, mask + K, true));
  std::vector<double> ratio(K, std::numeric_limits<double>::quiet_NaN());
  bool stepped = false;
  for (int64_t k = 0; k < K; ++k) {
    const double b = before[k], a = after[k];
    if (!(std::isfinite(b) && b > 0.0 && std::isfinite(a))) continue;
    stepped |= a != b;
    ratio[k] = std::clamp(1.0 - a / b, -1.0, 1.0) / group_size;
  }
  // If no loss has changed at all, there was no step.
  if (!stepped) return;

  for (int64_t i = 0; i < K; ++i) {
    if (!mask[i]) continue;
    float* row = matrix + i * K;
    for (int64_t k = 0; k < K; ++k) {
      const double seen = mask[k] ? observe_inside(ratio[i], ratio[k], i == k) : ratio[k];
      if (std::isnan(seen)) continue;
      row[k] = static_cast<float>((1.0 - decay) * static_cast<double>(row[k]) + decay * seen);
      if (observed != nullptr) ++observed[i * K + k];
    }
  }
}

}  // namespace taskgroup
