#include <vector>

#include "check.h"
#include "ops/cuda/combine_kernel.cuh"
#include "random_gradients.h"

namespace taskgroup {

constexpr int kThreads = 32;

template <typename T>
int run(const Gradients& gradients, Dtype dtype, const std::vector<void*>& outputs,
        const void* weights, bool wide) {
  int launches = 0;
  for_each_combine_table<T, kThreads>(
      gradients, dtype, outputs, weights, wide, [&](const CombineTable& table, int64_t blocks) {
        ++launches;
        shim::launch({static_cast<unsigned>(blocks), 1}, kThreads, kMostTasks * sizeof(wide_t<T>),
                     [&](void* shared) { combine_block<T, kThreads>(table, shared); });
      });
  return launches;
}

// With in_place, the output is the gradient of the last task that has one.
void test(RandomGradients random, bool wide, bool in_place, int64_t out_offset, int launches) {
  const Gradients& gradients = random.gradients;
  const int64_t K = gradients.n_tasks;
  std::vector<double> weights(K);
  std::vector<float> narrow_weights(K);
  for (int64_t k = 0; k < K; ++k) {
    weights[k] = narrow_weights[k] = static_cast<float>(std::cos(static_cast<double>(k)));
  }
  std::vector<std::vector<Words>> memory;
  std::vector<void*> outputs;
  for (const Parameter& parameter : gradients.parameters) {
    memory.emplace_back(((parameter.numel + out_offset) * size_of(parameter.dtype) + 15) / 16);
    outputs.push_back(reinterpret_cast<unsigned char*>(memory.back().data()) +
                      out_offset * size_of(parameter.dtype));
    if (in_place) outputs.back() = const_cast<void*>(gradients.all[parameter.end - 1].data);
  }
  const void* given = wide ? static_cast<void*>(weights.data()) : narrow_weights.data();
  int launched = run<float>(gradients, Dtype::kFloat, outputs, given, wide);
  launched += run<double>(gradients, Dtype::kDouble, outputs, given, wide);
  launched += run<BFloat16>(gradients, Dtype::kBFloat16, outputs, given, wide);
  launched += run<Half>(gradients, Dtype::kHalf, outputs, given, wide);
  CHECK(launched == launches);

  for (size_t t = 0; t < outputs.size(); ++t) {
    const Parameter& parameter = gradients.parameters[t];
    for (int64_t x = 0; x < parameter.numel; ++x) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < K; ++k) {
        if (random.values[k][t].empty()) continue;
        const double term = weights[k] * random.values[k][t][x];
        sum += term;
        size += std::fabs(term);
      }
      double result = 0, unit = 0;  // what the kernel computed, and the rounding unit of its dtype
      switch (parameter.dtype) {
        case Dtype::kFloat:
          result = static_cast<float*>(outputs[t])[x];
          break;
        case Dtype::kDouble:
          result = static_cast<double*>(outputs[t])[x];
          break;
        case Dtype::kBFloat16:
          result = widen(static_cast<BFloat16*>(outputs[t])[x]);
          unit = 0x1p-9;
          break;
        case Dtype::kHalf:
          result = widen(static_cast<Half*>(outputs[t])[x]);
          unit = 0x1p-12;
      }
      const double rounding = parameter.dtype == Dtype::kDouble ? 1e-14 : 1e-6;
      CHECK(close(result, sum, rounding * size + 2 * unit * std::fabs(sum) + 1e-7 * (unit > 0)));
    }
  }
}

}  // namespace taskgroup

int main() {
  using namespace taskgroup;
  const auto odd = [](int64_t k, int64_t t) { return (k + t) % 3; };
  const auto some = [](int64_t k, int64_t t) -> int64_t { return k > 0 && (k * 5 + t) % 4 == 0; };
  for (const Dtype dtype : {Dtype::kFloat, Dtype::kDouble, Dtype::kBFloat16, Dtype::kHalf}) {
    const std::vector<RandomGradients::Shape> shapes = {
        {1, dtype}, {0, dtype}, {1100, dtype}, {17, dtype}, {512, dtype}};
    for (const int K : {1, 2, 4, 11}) {
      for (const bool in_place : {false, true}) {
        test({K, shapes, none, none}, in_place, in_place, 0, 1);
        test({K, shapes, some, odd}, !in_place, in_place, 0, 1);
      }
    }
    test({3, shapes, some, none}, false, false, 1, 1);
  }
  // All types in one call.
  test({3,
        {{70, Dtype::kFloat}, {9, Dtype::kHalf}, {30, Dtype::kDouble}, {8, Dtype::kBFloat16}},
        some,
        none},
       false, false, 0, 4);
  // More parameters, and more rows, than a table holds.
  test({2, std::vector<RandomGradients::Shape>(300, {3, Dtype::kFloat}), some, none}, false, false,
       0, 2);
  test({1024, std::vector<RandomGradients::Shape>(5, {33, Dtype::kFloat}), none, none}, true, true,
       0, 3);
  // NaN, and the product of infinity and zero.
  RandomGradients bad(3, {{40, Dtype::kFloat}}, none, none);
  bad.put(1, 0, 5, NAN);
  bad.put(2, 0, 7, INFINITY);
  test(std::move(bad), false, false, 0, 1);
}
