#include <utility>
#include <vector>

#include "check.h"
#include "gram_on_host.h"

using namespace taskgroup;

namespace {

const auto odd = [](int64_t k, int64_t t) { return (k + t) % 3; };
const auto some = [](int64_t k, int64_t t) -> int64_t { return (k * 5 + t) % 4 == 1; };

// The sizes of the parameters: none, less than a tile, whole tiles, several tiles and a rest.
std::vector<RandomGradients::Shape> shapes(Dtype dtype, int64_t tile) {
  return {{0, dtype}, {5, dtype}, {2 * tile, dtype}, {1, dtype}, {5 * tile + 7, dtype}};
}

template <int R, int kThreads, bool kBulk>
void test_fma(int K, int stages) {
  using G = GramFma<float, R, true, kThreads>;
  const auto sizes = shapes(Dtype::kFloat, G::kTile);
  const auto run = [&](const Gradients& gradients) {
    return gram_on_host<G>(gradients, Dtype::kFloat, fma_on_host<G, kBulk>(0, 0, stages));
  };
  check_gram({K, sizes, none, none}, run);
  check_gram({K, sizes, some, odd}, run);
}

void test_same_to_the_bit() {
  using G = GramFma<float, 4, true, 64>;
  const RandomGradients random(3, shapes(Dtype::kFloat, G::kTile), some, none);
  const auto run = [&](int stages) {
    return gram_on_host<G>(random.gradients, Dtype::kFloat, fma_on_host<G, true>(0, 0, stages));
  };
  const std::vector<double> gram = run(2);
  CHECK(run(2) == gram);
  CHECK(run(3) == gram);
  CHECK(gram_on_host<G>(random.gradients, Dtype::kFloat, fma_on_host<G, false>(0, 0, 0)) == gram);
}

void test_not_finite_fma() {
  using G = GramFma<float, 4, true, 32>;
  RandomGradients random(3, {{3 * G::kTile, Dtype::kFloat}}, none, none);
  random.put(1, 0, 5, INFINITY);
  random.put(2, 0, G::kTile + 1, NAN);
  check_gram(random, [&](const Gradients& gradients) {
    return gram_on_host<G>(gradients, Dtype::kFloat, fma_on_host<G, true>(0, 0, 2));
  });
}

// A task without a gradient on a parameter adds nothing there, even if others are infinite.
void test_missing_beside_infinity() {
  using G = GramFma<float, 4, true, 32>;
  using D = GramFma<double, 8, false, 32>;
  const auto first = [](int64_t k, int64_t t) -> int64_t { return k == 0 && t == 1; };
  for (const double bad : {static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
    RandomGradients random(3, {{40, Dtype::kFloat}, {2 * G::kTile + 3, Dtype::kFloat}}, first,
                           none);
    random.put(1, 1, 5, bad);             // copied through the ring
    random.put(2, 1, 2 * G::kTile, bad);  // past the tiles of the ring
    for (const int stages : {0, 2}) {
      check_gram(random, [&](const Gradients& gradients) {
        return gram_on_host<G>(
            gradients, Dtype::kFloat,
            stages > 0 ? fma_on_host<G, true>(0, 0, stages) : fma_on_host<G, false>(0, 0, 0));
      });
    }
    RandomGradients wide(3, {{40, Dtype::kDouble}, {50, Dtype::kDouble}}, first, none);
    wide.put(1, 1, 5, bad);
    check_gram(wide, [&](const Gradients& gradients) {
      return gram_on_host<D>(gradients, Dtype::kDouble, double_on_host<D>(gradients.n_tasks));
    });
  }
}

void test_double(int K) {
  using G = GramFma<double, 8, false, 32>;
  const auto run = [&](const Gradients& gradients) {
    return gram_on_host<G>(gradients, Dtype::kDouble, double_on_host<G>(gradients.n_tasks));
  };
  check_gram({K, shapes(Dtype::kDouble, G::kTile), some, odd}, run);
  check_gram({K, shapes(Dtype::kDouble, G::kTile), none, none}, run);
}

// More parameters than a table holds, so that there are several launches, each with a last segment
// that is not full.
void test_overflow() {
  using G = GramFma<float, 2, true, 32>;
  RandomGradients random(2, std::vector<RandomGradients::Shape>(300, {3, Dtype::kFloat}), some,
                         odd);
  CHECK(gram_tables(random.gradients, Dtype::kFloat, G::kTile, 8, 16).size() == 2);
  check_gram(random, [&](const Gradients& gradients) {
    return gram_on_host<G>(gradients, Dtype::kFloat, fma_on_host<G, true>(0, 0, 2));
  });
}

void test_affinity() {
  using G = GramFma<float, 2, true, 32>;
  RandomGradients random(2, {{40, Dtype::kFloat}}, none, none);
  random.put(1, 0, 3, 1e20);  // its square is infinity
  const std::vector<double> gram =
      gram_on_host<G>(random.gradients, Dtype::kFloat, fma_on_host<G, false>(0, 0, 1));
  CHECK(std::isinf(gram[3]));
  for (const auto& [wide, counted] :
       {std::pair(false, true), std::pair(true, true), std::pair(true, false)}) {
    std::vector<float> matrix(9, 2.0f);
    std::vector<int32_t> observed(9, 7);
    const double wide_losses[] = {0.5, NAN, 4.0};
    const float losses[] = {0.5f, NAN, 4.0f};
    GramAffinity result = {};
    result.matrix = matrix.data();
    result.K = 3;
    result.losses = wide ? static_cast<const void*>(wide_losses) : losses;
    result.wide_losses = wide;
    result.decay = 0.25;
    result.lr = 0.5;
    result.observed = counted ? observed.data() : nullptr;
    result.tasks[0] = 0;
    result.tasks[1] = 2;
    finish_on_host(last_partial(), 2, result);
    const auto expected = [&](double product, double loss) {
      return static_cast<float>(0.75 * 2.0 + 0.25 * (0.5 * product / loss));
    };
    for (int e = 0; e < 9; ++e) {
      CHECK(matrix[e] == (e == 0   ? expected(gram[0], 0.5)
                          : e == 2 ? expected(gram[1], 4.0)
                          : e == 6 ? expected(gram[1], 0.5)
                                   : 2.0f));
      CHECK(observed[e] == (counted && (e == 0 || e == 2 || e == 6) ? 8 : 7));
    }
  }
}

}  // namespace

int main() {
  test_fma<2, 32, false>(1, 0);
  test_fma<2, 32, true>(2, 1);
  test_fma<4, 64, true>(3, 3);
  test_fma<6, 96, true>(5, 4);
  test_fma<12, 32, true>(11, 2);
  test_fma<16, 64, true>(16, 2);
  test_same_to_the_bit();
  test_not_finite_fma();
  test_missing_beside_infinity();
  for (const int K : {1, 8, 17}) test_double(K);
  test_overflow();
  test_affinity();
}
