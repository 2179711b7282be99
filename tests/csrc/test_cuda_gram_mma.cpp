#include <vector>

#include "check.h"
#include "gram_on_host.h"

using namespace taskgroup;

namespace {

// Only the first parameter is aligned.
const auto odd = [](int64_t k, int64_t t) { return t == 0 ? 0 : (k + t) % 3; };
const auto some = [](int64_t k, int64_t t) -> int64_t { return (k * 5 + t) % 4 == 1; };

template <typename T>
constexpr Dtype kDtype = Dtype::kFloat;
template <>
constexpr Dtype kDtype<BFloat16> = Dtype::kBFloat16;
template <>
constexpr Dtype kDtype<Half> = Dtype::kHalf;

template <typename T, int kTasks>
using Triangle = GramMma<T, kTasks / 8, kTasks / 8, true, 1>;
template <typename T>
using Rectangle = GramMma<T, kMmaHalf / 8, kMmaHalf / 8, false, 1>;

template <typename T, int kTasks>
std::vector<double> run(const Gradients& gradients) {
  return gram_on_host<Triangle<T, kTasks>>(gradients, kDtype<T>,
                                           mma_on_host<Triangle<T, kTasks>>(0, 0));
}

template <typename T, int kTasks>
void test(int K) {
  const Dtype dtype = kDtype<T>;
  check_gram({K, {{67, dtype}, {0, dtype}, {29, dtype}}, some, odd}, run<T, kTasks>);
}

// Two warps, and segments of several tiles.
template <typename T>
void test_long() {
  using G = GramMma<T, 2, 2, true, 2>;
  check_gram({9, {{5 * G::kTile + 70, kDtype<T>}, {40, kDtype<T>}}, some, none},
             [](const Gradients& gradients) {
               return gram_on_host<G>(gradients, kDtype<T>, mma_on_host<G>(0, 0));
             });
}

// More than 64 tasks, divided as the launcher divides them.
template <typename T>
void test_blocks(int K) {
  const auto pass = [=](const GramTable& table, double* partial) {
    for (int first = 0; first < K; first += kMmaBlock) {
      mma_on_host<Triangle<T, kMmaBlock>>(first, first)(table, partial);
    }
    for (int y = 0; y < pairs_of_halves(K); ++y) {
      const Halves at = halves(y);
      CHECK(at.first / kMmaBlock < at.other / kMmaBlock);
      mma_on_host<Rectangle<T>>(at.first, at.other)(table, partial);
    }
  };
  check_gram({K, {{40, kDtype<T>}, {3, kDtype<T>}}, some, odd}, [&](const Gradients& gradients) {
    return gram_on_host<Rectangle<T>>(gradients, kDtype<T>, pass);
  });
}

template <typename T>
void test_not_finite() {
  for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    RandomGradients random(3, {{70, kDtype<T>}}, none, none);
    for (int k = 0; k < 3; ++k) {
      for (int x = 0; x < 70; ++x) random.put(k, 0, x, k + 1);  // avoids infinity minus infinity
    }
    random.put(1, 0, 66, bad);
    check_gram(random, run<T, 16>);
  }
}

// A task without a gradient on a parameter adds nothing there, even if others are infinite.
template <typename T>
void test_missing_beside_infinity() {
  const auto first = [](int64_t k, int64_t t) -> int64_t { return k == 0 && t == 1; };
  RandomGradients random(3, {{300, kDtype<T>}, {300, kDtype<T>}}, first, none);
  random.put(1, 1, 290, INFINITY);
  check_gram(random, run<T, 16>);
}

// Numbers close to the largest float, which round to infinity as bfloat16.
void test_largest() {
  RandomGradients random(2, {{20, Dtype::kFloat}}, none, none);
  for (int x = 0; x < 20; ++x) {
    random.put(0, 0, x, x == 3 ? 3.4e38 : 0);
    random.put(1, 0, x, x == 3 ? 1e-20 : 0);
  }
  const std::vector<double> gram = run<float, 16>(random.gradients);
  CHECK(std::isinf(gram[0]));
  CHECK(close(gram[1] / 3.4e18, 1, 1e-6));
}

// All elements are equal, so that every sum is rounded in the same direction.
void test_equal_numbers() {
  for (const double value : {0.1, 1.0 / 3, 0.7, 1.1}) {
    RandomGradients random(2, {{192, Dtype::kFloat}}, none, none);
    for (int k = 0; k < 2; ++k) {
      for (int x = 0; x < 192; ++x) random.put(k, 0, x, value);
    }
    check_gram(random, run<float, 16>, 5e-7);
  }
}

}  // namespace

int main() {
  test<float, 16>(3);
  test<BFloat16, 16>(16);
  test<Half, 16>(11);
  test<float, 32>(17);
  test<BFloat16, 48>(33);
  test<float, 64>(64);
  test<Half, 64>(50);
  test_long<float>();
  test_long<Half>();
  test_blocks<BFloat16>(65);
  test_blocks<float>(130);
  test_not_finite<float>();
  test_not_finite<BFloat16>();
  test_not_finite<Half>();
  test_missing_beside_infinity<float>();
  test_missing_beside_infinity<BFloat16>();
  test_missing_beside_infinity<Half>();
  test_largest();
  test_equal_numbers();
}
