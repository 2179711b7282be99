#include <algorithm>
#include <cstdio>
#include <limits>
#include <random>

#include "check.h"
#include "host/affinity_propagation.h"
#include "host/normalised_affinity.h"

// Tests the clustering, for every instruction set of this processor, on matrices with obvious
// clusters and against the messages as written in the paper. Also tests the matrix that is
// clustered.

using namespace taskgroup;

namespace {

using Matrix = std::vector<double>;  // [K, K]
using Labels = std::optional<std::vector<int64_t>>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Problem {
  int64_t K;
  Matrix similarity;
  std::vector<double> preference;  // [K], or empty for the median
  double damping = 0.5;
  int64_t max_iter = 200, convergence_iter = 50;
};

Matrix normal(std::mt19937& random, int64_t K) {
  std::normal_distribution<double> distribution;
  Matrix matrix(K * K);
  for (double& x : matrix) x = distribution(random);
  return matrix;
}

Labels cluster(const Problem& p, InstructionSet isa, const Matrix& noise) {
  return affinity_propagation(p.similarity.data(),
                              p.preference.empty() ? nullptr : p.preference.data(), noise.data(),
                              p.K, p.damping, p.max_iter, p.convergence_iter, isa);
}

// Frey and Dueck's formulas, message by message, with sums in the order of the tasks.
Labels message_by_message(const Problem& p, const Matrix& noise) {
  const int64_t K = p.K;
  std::vector<double> sorted = p.similarity;
  std::sort(sorted.begin(), sorted.end());
  const double median = (sorted[(K * K - 1) / 2] + sorted[K * K / 2]) / 2;
  Matrix S = p.similarity, R(K * K, 0.0), A(K * K, 0.0);
  for (int64_t k = 0; k < K; ++k) S[k * K + k] = p.preference.empty() ? median : p.preference[k];
  for (int64_t x = 0; x < K * K; ++x) {
    const double ulp = std::numeric_limits<double>::epsilon() * S[x];
    S[x] += (ulp + 100 * std::numeric_limits<double>::min()) * noise[x];
  }

  std::vector<int64_t> exemplars, previous;
  int64_t held = 0;
  for (int64_t iteration = 0;; ++iteration) {
    if (iteration == p.max_iter) return std::nullopt;
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t k = 0; k < K; ++k) {
        double rival = -kInfinity;
        for (int64_t j = 0; j < K; ++j) {
          if (j != k) rival = std::max(rival, A[i * K + j] + S[i * K + j]);
        }
        double& r = R[i * K + k];
        r = r * p.damping + (S[i * K + k] - rival) * (1 - p.damping);
      }
    }
    for (int64_t k = 0; k < K; ++k) {
      double support = 0;
      for (int64_t j = 0; j < K; ++j) support += j == k ? R[j * K + k] : std::max(R[j * K + k], 0.);
      for (int64_t i = 0; i < K; ++i) {
        const double own = i == k ? R[i * K + k] : std::max(R[i * K + k], 0.0);
        const double excess = i == k ? own - support : std::max(own - support, 0.0);
        double& a = A[i * K + k];
        a = a * p.damping - excess * (1 - p.damping);
      }
    }
    previous.swap(exemplars);
    exemplars.clear();
    for (int64_t k = 0; k < K; ++k) {
      if (A[k * K + k] + R[k * K + k] > 0) exemplars.push_back(k);
    }
    held = exemplars == previous ? held + 1 : 1;
    if (iteration >= p.convergence_iter && held >= p.convergence_iter && !exemplars.empty()) break;
  }

  const auto exemplar_of = [&](int64_t i) {
    if (std::count(exemplars.begin(), exemplars.end(), i)) return i;
    return *std::max_element(exemplars.begin(), exemplars.end(),
                             [&](int64_t a, int64_t b) { return S[i * K + a] < S[i * K + b]; });
  };
  std::vector<int64_t> better;
  for (const int64_t exemplar : exemplars) {
    int64_t best = -1;
    double most = -kInfinity;
    for (int64_t k = 0; k < K; ++k) {
      if (exemplar_of(k) != exemplar) continue;
      double sum = 0;
      for (int64_t i = 0; i < K; ++i) sum += exemplar_of(i) == exemplar ? S[i * K + k] : 0;
      if (sum > most) most = sum, best = k;
    }
    better.push_back(best);
  }
  exemplars = better;
  std::vector<int64_t> order = exemplars, labels;
  std::sort(order.begin(), order.end());
  for (int64_t i = 0; i < K; ++i) {
    labels.push_back(std::find(order.begin(), order.end(), exemplar_of(i)) - order.begin());
  }
  return labels;
}

void test_by_eye(InstructionSet isa) {
  const auto labels = [&](int64_t K, const Matrix& similarity, std::vector<double> preference) {
    std::mt19937 random(0);
    return cluster({K, similarity, preference}, isa, normal(random, K)).value();
  };
  using Found = std::vector<int64_t>;
  CHECK(labels(1, {3.0}, {}) == Found{0});
  // All tasks are alike: they stay alone or form one cluster, depending on the preference.
  CHECK(labels(3, Matrix(9, 1.0), {2, 2, 2}) == (Found{0, 1, 2}));
  CHECK(labels(3, Matrix(9, 1.0), {}) == (Found{0, 0, 0}));
  // Tasks 0 and 1 are similar, and task 2 is not similar to them.
  const Matrix three = {1.0, 0.8, -0.3, 0.7, 1.0, -0.4, -0.3, -0.4, 1.0};
  CHECK(labels(3, three, {0, 0, 0}) == (Found{0, 0, 1}));
  // The clusters are i % 3, with similarities near 1 within and near 0 between them. A row takes
  // several vectors and a rest.
  for (const int64_t K : {9, 16, 37}) {
    std::mt19937 random(1);
    Matrix similarity = normal(random, K);
    Found expected;
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t k = 0; k < K; ++k) {
        double& s = similarity[i * K + k];
        s = 0.02 * s + (i % 3 == k % 3 ? 1.0 : 0.0);
      }
    }
    Found found = labels(K, similarity, {});
    for (int64_t i = 0; i < K; ++i) expected.push_back(found[i % 3]);
    CHECK(found == expected && found[0] != found[1] && found[1] != found[2] &&
          found[0] != found[2]);
  }
}

void test_messages() {
  std::mt19937 random(2);
  int converged = 0, tested = 0;
  for (const int64_t K : {2, 3, 7, 8, 9, 16, 25}) {
    for (int repeat = 0; repeat < 6; ++repeat) {
      Problem p{K, normal(random, K), {}};
      if (repeat % 3 == 1) p.preference = std::vector<double>(K, -1.5);
      if (repeat % 3 == 2) p.preference = normal(random, K), p.preference.resize(K);
      if (repeat >= 3) {
        p.damping = 0.8;
        p.max_iter = 40;
        p.convergence_iter = 15;
        for (double& s : p.similarity) s = std::round(s);  // makes ties
      }
      const Matrix noise = normal(random, K);
      const Labels expected = message_by_message(p, noise);
      for (const InstructionSet isa : kInstructionSets) {
        if (isa <= best_instruction_set()) CHECK(cluster(p, isa, noise) == expected);
      }
      converged += expected.has_value();
      ++tested;
    }
  }
  CHECK(0 < converged && converged < tested);
}

template <typename T>
void test_normalise() {
  // Task 1 is not known. Entries that are not finite count as zero.
  const T affinity[] = {2, 9, 1, 9, 0, 9, T(kInfinity), 9, 4};
  const NormalisedAffinity found = normalise(affinity, 3);
  CHECK(found.known == (std::vector<int64_t>{0, 2}));
  CHECK(found.similarity == (Matrix{1, 0.125, 0.125, 1}));
  CHECK(!found.complete);
  const T unknown[] = {T(NAN), 1, 1, -1};
  CHECK(normalise(unknown, 2).known.empty() && normalise(unknown, 2).similarity.empty());

  constexpr int64_t K = 70;  // more than one tile
  std::mt19937 random(3);
  std::vector<T> large;
  for (const double x : normal(random, K)) large.push_back(static_cast<T>(x));
  for (int64_t k = 0; k < K; ++k) large[k * K + k] = static_cast<T>(1 + 0.25 * (k % 5));
  const NormalisedAffinity all = normalise(large.data(), K);
  CHECK(all.known.size() == K);
  CHECK(all.complete);
  const auto ratio = [&](int64_t i, int64_t k) {
    return static_cast<double>(large[i * K + k]) / static_cast<double>(large[k * K + k]);
  };
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      CHECK(all.similarity[i * K + k] == (ratio(i, k) + ratio(k, i)) / 2);
    }
  }
}

}  // namespace

int main() {
  for (const InstructionSet isa : kInstructionSets) {
    if (isa > best_instruction_set()) continue;
    test_by_eye(isa);
    std::printf("ran on %s\n", name_of(isa));
  }
  test_messages();
  test_normalise<float>();
  test_normalise<double>();
}
