#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "ops/cuda/elements.cuh"
#include "ops/gradients.h"

namespace taskgroup {

// K gradients on each of T parameters, each in its own memory, and their values in float64.
struct RandomGradients {
  struct Shape {
    int64_t numel;
    Dtype dtype;
  };
  using Of = std::function<int64_t(int64_t k, int64_t t)>;

  // A gradient is missing if missing(k, t) != 0. It starts offset(k, t) elements after an aligned
  // address.
  RandomGradients(int64_t K, const std::vector<Shape>& shapes, const Of& missing, const Of& offset,
                  unsigned seed = 0)
      : values(K) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    gradients.n_tasks = K;
    for (size_t t = 0; t < shapes.size(); ++t) {
      const auto [numel, dtype] = shapes[t];
      const auto begin = static_cast<int64_t>(gradients.all.size());
      for (int64_t k = 0; k < K; ++k) {
        values[k].emplace_back();
        if (missing(k, t)) continue;
        // The memory ends with the last element, so that the address sanitizer detects a read past
        // it.
        const int64_t bytes = (offset(k, t) + numel) * size_of(dtype);
        void* whole = nullptr;
        if (posix_memalign(&whole, 16, bytes + 1) != 0) std::abort();
        memory.emplace_back(static_cast<unsigned char*>(whole), std::free);
        unsigned char* data = memory.back().get() + offset(k, t) * size_of(dtype);
        gradients.all.push_back({data, static_cast<int32_t>(k), nullptr});
        for (int64_t x = 0; x < numel; ++x)
          values[k][t].push_back(set(data, dtype, x, normal(random)));
      }
      gradients.parameters.push_back(
          {numel, dtype, false, 0, nullptr, begin, static_cast<int64_t>(gradients.all.size())});
    }
  }

  // Writes a value in the dtype and returns the rounded value.
  static double set(void* data, Dtype dtype, int64_t x, double value) {
    switch (dtype) {
      case Dtype::kDouble:
        return static_cast<double*>(data)[x] = value;
      case Dtype::kFloat:
        return static_cast<float*>(data)[x] = static_cast<float>(value);
      case Dtype::kBFloat16:
        return widen(static_cast<BFloat16*>(data)[x] = narrow<BFloat16>(static_cast<float>(value)));
      default:
        return widen(static_cast<Half*>(data)[x] = narrow<Half>(static_cast<float>(value)));
    }
  }

  // Sets element x of gradient k on parameter t to `value`. The gradient must not be missing.
  void put(int64_t k, int64_t t, int64_t x, double value) {
    const Parameter& parameter = gradients.parameters[t];
    for (int64_t i = parameter.begin; i < parameter.end; ++i) {
      if (gradients.all[i].task != k) continue;
      values[k][t][x] = set(const_cast<void*>(gradients.all[i].data), parameter.dtype, x, value);
    }
  }

  Gradients gradients;
  std::vector<std::vector<std::vector<double>>>
      values;  // [K][T][numel]; empty if the gradient is missing
  std::vector<std::unique_ptr<unsigned char, void (*)(void*)>> memory;
};

inline int64_t none(int64_t, int64_t) { return 0; }

}  // namespace taskgroup
