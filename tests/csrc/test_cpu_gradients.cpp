#include <cstdlib>
#include <thread>
#include <vector>

#include "check.h"
#include "ops/cpu/combine.h"
#include "ops/cpu/gram.h"
#include "random_gradients.h"

// Compares gram() and combine(), for every instruction set of this processor, with plain sums.

namespace taskgroup {
extern const GradientLoops kEmulatedLoops;
}

using namespace taskgroup;

namespace {

void serial(int64_t n, const std::function<void(int64_t, int64_t)>& body) { body(0, n); }

void threaded(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i)
    threads.emplace_back([&, i] { body(n * i / 3, n * (i + 1) / 3); });
  for (std::thread& thread : threads) thread.join();
}

std::vector<double> matrix(const Gradients& gradients, const GradientLoops& loops,
                           const ParallelFor& parallel_for) {
  const int64_t K = gradients.n_tasks;
  std::vector<double> result(K * K, NAN);
  gram(gradients, loops, parallel_for, [&](int64_t i, int64_t j, double product) {
    CHECK(i <= j && std::isnan(result[i * K + j]));  // each pair is reported once
    result[i * K + j] = result[j * K + i] = product;
  });
  return result;
}

double exact(const RandomGradients& random, int64_t i, int64_t j) {
  double sum = 0;
  for (size_t t = 0; t < random.values[i].size(); ++t) {
    if (random.values[i][t].empty() || random.values[j][t].empty()) continue;
    for (size_t x = 0; x < random.values[i][t].size(); ++x) {
      sum += random.values[i][t][x] * random.values[j][t][x];
    }
  }
  return sum;
}

void test_gram(const RandomGradients& random, const GradientLoops& loops) {
  const int64_t K = random.gradients.n_tasks;
  const std::vector<double> result = matrix(random.gradients, loops, serial);
  CHECK(result == matrix(random.gradients, loops, threaded));
  std::vector<double> norms(K);
  for (int64_t i = 0; i < K; ++i) norms[i] = std::sqrt(exact(random, i, i));
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t j = i; j < K; ++j) {
      CHECK(close(result[i * K + j], exact(random, i, j), 1e-6 * norms[i] * norms[j]));
    }
  }
}

double read(const void* data, Dtype dtype, int64_t x) {
  switch (dtype) {
    case Dtype::kDouble:
      return static_cast<const double*>(data)[x];
    case Dtype::kFloat:
      return static_cast<const float*>(data)[x];
    case Dtype::kBFloat16:
      return widen(static_cast<const BFloat16*>(data)[x]);
    default:
      return widen(static_cast<const Half*>(data)[x]);
  }
}

void test_combine(const RandomGradients& random, const GradientLoops& loops, bool in_place) {
  const Gradients& gradients = random.gradients;
  std::vector<double> weights;
  for (int64_t k = 0; k < gradients.n_tasks; ++k) {
    weights.push_back(static_cast<float>(std::cos(static_cast<double>(k))));
  }
  std::vector<std::vector<double>> memory;
  std::vector<Output> outputs;
  for (const Parameter& parameter : gradients.parameters) {
    memory.emplace_back(parameter.numel + 1, 7.0);
    outputs.push_back({memory.back().data(), nullptr});
    if (in_place) outputs.back().data = const_cast<void*>(gradients.all[parameter.begin].data);
  }
  combine(gradients, weights.data(), outputs, loops, threaded);
  for (size_t t = 0; t < outputs.size(); ++t) {
    const Parameter& parameter = gradients.parameters[t];
    for (int64_t x = 0; x < parameter.numel; ++x) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < gradients.n_tasks; ++k) {
        if (random.values[k][t].empty()) continue;
        sum += weights[k] * random.values[k][t][x];
        size += std::fabs(weights[k] * random.values[k][t][x]);
      }
      const double unit = parameter.dtype == Dtype::kBFloat16 ? 0x1p-8
                          : parameter.dtype == Dtype::kHalf   ? 0x1p-11
                                                              : 1e-6;
      CHECK(close(read(outputs[t].data, parameter.dtype, x), sum, unit * size + 1e-6));
    }
    if (!in_place) CHECK(memory[t].back() == 7.0 || parameter.dtype != Dtype::kDouble);
  }
}

// A [3, 5] matrix, row by row in one task and column by column in the other.
void test_strides(const GradientLoops& loops) {
  float rows[15], columns[15], out[30];
  double sum = 0;
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 5; ++j) {
      rows[i * 5 + j] = static_cast<float>(i + 1);
      columns[j * 3 + i] = static_cast<float>(10 * i + j);
      sum += (i + 1) * (10 * i + j);
    }
  }
  const int64_t sizes[] = {3, 5}, by_row[] = {5, 1}, by_column[] = {1, 3}, with_gaps[] = {10, 2};
  Gradients gradients;
  gradients.n_tasks = 2;
  gradients.all = {{rows, 0, by_row}, {columns, 1, by_column}};
  gradients.parameters = {{15, Dtype::kFloat, true, 2, sizes, 0, 2}};
  CHECK(matrix(gradients, loops, serial)[1] == sum);
  std::fill(std::begin(out), std::end(out), -1.0f);
  const double weights[] = {2.0, 1.0};
  combine(gradients, weights, {{out, with_gaps}}, loops, serial);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 5; ++j) {
      CHECK(out[i * 10 + j * 2] == static_cast<float>(2 * (i + 1) + 10 * i + j));
      CHECK(out[i * 10 + j * 2 + 1] == -1.0f);
    }
  }
}

// All elements are equal. This is the worst case, because every sum is rounded in the same
// direction.
void test_accuracy_bound(const GradientLoops& loops) {
  for (const float value : {0.1f, 1.0f / 3, 0.7f, 1.1f}) {
    const std::vector<float> same(100003, value);
    Gradients gradients;
    gradients.n_tasks = 1;
    gradients.all = {{same.data(), 0, nullptr}};
    gradients.parameters = {{100003, Dtype::kFloat, false, 0, nullptr, 0, 1}};
    const double expected = 100003.0 * value * value;
    CHECK(close(matrix(gradients, loops, serial)[0], expected, 1e-6 * expected));
  }
}

template <typename T>
void check_equal_rows(const std::vector<T>& row, Dtype dtype, const GradientLoops& loops,
                      double expected, double tolerance) {
  const auto n = static_cast<int64_t>(row.size());
  for (const int32_t K : {1, 17}) {  // few tasks, and so many that tiles are used
    Gradients gradients;
    gradients.n_tasks = K;
    for (int32_t k = 0; k < K; ++k) gradients.all.push_back({row.data(), k, nullptr});
    gradients.parameters = {{n, dtype, false, 0, nullptr, 0, K}};
    for (const double product : matrix(gradients, loops, serial)) {
      CHECK(close(product, expected, tolerance * expected));
    }
  }
}

// The same for bfloat16.
void test_accuracy_bound_of_bfloat16(const GradientLoops& loops) {
  for (const float value : {0.1f, 1.0f / 3, 0.7f, 1.1f}) {
    const std::vector<BFloat16> same(100003, narrow<BFloat16>(value));
    const double expected = 100003.0 * widen(same[0]) * widen(same[0]);
    check_equal_rows(same, Dtype::kBFloat16, loops, expected, 1e-6);
  }
}

// A large element, and many whose squares are just too small to change the square of the large one:
// each addition to it loses one of them.
void test_most_additions(const GradientLoops& loops) {
  constexpr int64_t n = 1792;
  constexpr float small = 0x1.fep-13f;  // of 8 bits; its square is below 2^-24
  std::vector<float> floats(n, small);
  std::vector<BFloat16> brains(n, narrow<BFloat16>(small));
  floats[0] = 1;
  brains[0] = narrow<BFloat16>(1.0f);
  const double expected = 1 + (n - 1) * static_cast<double>(small) * small;
  const double tolerance = kMostAdditions * 0x1p-24;
  check_equal_rows(floats, Dtype::kFloat, loops, expected, tolerance);
  check_equal_rows(brains, Dtype::kBFloat16, loops, expected, tolerance);
}

// bfloat16, in blocks of tasks of every shape, over several chunks and with a tail.
void test_many_bfloat16(const GradientLoops& loops) {
  const auto some = [](int64_t k, int64_t t) -> int64_t { return (k * 5 + t) % 4 == 1; };
  const auto odd = [](int64_t k, int64_t t) { return (k + t) % 3; };
  for (const int64_t K : {17, 50, 82}) {
    const std::vector<RandomGradients::Shape> shapes = {{2100, Dtype::kBFloat16},
                                                        {31, Dtype::kBFloat16}};
    test_gram({K, shapes, none, odd}, loops);
    test_gram({K, shapes, some, odd}, loops);
  }
}

// A task without a gradient on a parameter adds nothing there, even if others are infinite.
void test_missing_beside_infinity(const GradientLoops& loops) {
  for (const Dtype dtype : {Dtype::kFloat, Dtype::kBFloat16}) {
    const auto two = [](int64_t k, int64_t t) -> int64_t { return (k == 0 || k == 18) && t == 1; };
    RandomGradients random(20, {{40, dtype}, {700, dtype}}, two, none);
    random.put(1, 1, 5, INFINITY);
    random.put(17, 1, 300, NAN);
    const std::vector<double> result = matrix(random.gradients, loops, serial);
    for (int64_t k = 0; k < 20; ++k) {
      CHECK(std::isfinite(result[k]) && std::isfinite(result[k * 20 + 18]));
    }
    CHECK(std::isinf(result[1 * 20 + 2]) && std::isnan(result[17 * 20 + 2]));
    CHECK(std::isfinite(result[2 * 20 + 3]));
  }
}

void test_not_finite(const GradientLoops& loops) {
  RandomGradients random(3, {{700, Dtype::kFloat}}, none, none);
  random.put(1, 0, 650, INFINITY);
  random.put(2, 0, 3, NAN);
  const std::vector<double> result = matrix(random.gradients, loops, serial);
  CHECK(std::isfinite(result[0]) && std::isinf(result[1]) && std::isinf(result[4]));
  CHECK(std::isnan(result[2]) && std::isnan(result[5]) && std::isnan(result[8]));
}

// The results are bitwise those of the plain functions, for all numbers of two bytes.
template <typename T, typename Widen, typename Combine>
void test_conversions(Widen widen_all, Combine combine_all) {
  constexpr int64_t kAll = 1 << 16;
  std::vector<uint16_t> bits(kAll), back(kAll);
  std::vector<float> wide(kAll);
  for (int64_t x = 0; x < kAll; ++x) bits[x] = static_cast<uint16_t>(x);
  const auto same = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  const auto number = [](uint16_t word) {
    T element;
    std::memcpy(&element, &word, 2);
    return widen(element);
  };
  widen_all(bits.data(), kAll - 3, wide.data());  // a tail
  for (int64_t x = 0; x < kAll - 3; ++x) CHECK(same(wide[x], number(bits[x])));
  // These products round down, up, to even, to subnormal numbers, to zero and to infinity.
  for (const float weight : {1.0f, 0.5f, 1.0009765625f, 1.00390625f, 3.7f, 0x1p-9f, 1e-7f, 77.0f}) {
    const uint16_t* rows[] = {bits.data()};
    combine_all(rows, &weight, 1, kAll, back.data());
    for (int64_t x = 0; x < kAll; ++x) {
      CHECK(same(number(back[x]), widen(narrow<T>(number(bits[x]) * weight))));
    }
  }
}

void test(const GradientLoops& loops) {
  const auto some = [](int64_t k, int64_t t) -> int64_t { return (k * 5 + t) % 4 == 1; };
  const auto odd = [](int64_t k, int64_t t) { return (k + t) % 3; };
  for (const int64_t K : {1, 3, 4, 5, 11, 65, 130}) {
    const std::vector<RandomGradients::Shape> shapes = {
        {0, Dtype::kFloat},   {5, Dtype::kFloat},
        {600, Dtype::kFloat}, {33, Dtype::kDouble},
        {70, Dtype::kHalf},   {530, Dtype::kBFloat16},
        {16, Dtype::kFloat},  {K == 3 ? 70001 : 33, Dtype::kFloat},
    };
    for (const bool all : {true, false}) {
      RandomGradients random(K, shapes, all || K == 1 ? none : some, odd);
      test_gram(random, loops);
      test_combine(random, loops, false);
      test_combine(random, loops, true);
    }
  }
  test_strides(loops);
  test_accuracy_bound(loops);
  test_accuracy_bound_of_bfloat16(loops);
  test_most_additions(loops);
  test_many_bfloat16(loops);
  test_missing_beside_infinity(loops);
  test_not_finite(loops);
  test_conversions<BFloat16>(loops.widen_bfloat16, loops.combine_bfloat16);
  test_conversions<Half>(loops.widen_half, loops.combine_half);
}

}  // namespace

int main() {
  int64_t lanes = 4;  // in 16 bytes; twice as many with AVX2, and twice again with AVX-512
  for (const InstructionSet isa : kInstructionSets) {
    if (isa > best_instruction_set()) continue;
    CHECK(gradient_loops(isa).lanes == lanes && gradient_loops(isa).double_lanes == lanes / 2);
    CHECK((gradient_loops(isa).gram_bfloat16 != nullptr) == (isa >= InstructionSet::kAvx512Bf16));
    CHECK((gradient_loops(isa).tile_gram_bfloat16 != nullptr) == (isa >= InstructionSet::kAmx));
    test(gradient_loops(isa));
    std::printf("ran on %s\n", name_of(isa));
    if (isa < InstructionSet::kAvx512) lanes *= 2;
  }
  test(kEmulatedLoops);
  CHECK(&gradient_loops() == &gradient_loops(instruction_set()));
}
