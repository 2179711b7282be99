#include "host/affinity_propagation.h"

#include <algorithm>
#include <limits>
#include <numeric>

// The message passing is compiled once for each instruction set. This works only if all of its code
// is inlined into one function.
#define TASKGROUP_INLINE inline __attribute__((always_inline))

namespace taskgroup {

namespace {

// Rows are padded to whole vectors with similarities of -inf. A padded column is never the largest
// and sends no message (R = -inf, A = 0), so no loop needs a tail.
constexpr int64_t kLanes = 8;
constexpr double kLowest = -std::numeric_limits<double>::infinity();

TASKGROUP_INLINE double max(double a, double b) { return a > b ? a : b; }
TASKGROUP_INLINE double min(double a, double b) { return a < b ? a : b; }

struct Messages {
  int64_t K, width;
  std::vector<double> S, R, A;  // [K, width] similarities, responsibilities, availabilities
  // [width] For each column k, the sum of R[k, k] and of max(R[j, k], 0) over all j != k.
  std::vector<double> support;

  explicit Messages(int64_t K)
      : K(K),
        width((K + kLanes - 1) / kLanes * kLanes),
        S(K * width, kLowest),
        R(K * width, 0.0),
        A(K * width, 0.0),
        support(width, 0.0) {}
};

struct TopTwo {
  double first, second;
};

// Computes sum[j] = a[j] + s[j], and returns its two largest entries, which may be equal.
TASKGROUP_INLINE TopTwo add_top_two(const double* a, const double* s, double* sum, int64_t width) {
  double first[kLanes], second[kLanes];
  std::fill_n(first, kLanes, kLowest);
  std::fill_n(second, kLanes, kLowest);
  for (int64_t j = 0; j < width; j += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double x = a[j + lane] + s[j + lane];
      sum[j + lane] = x;
      second[lane] = max(second[lane], min(first[lane], x));
      first[lane] = max(first[lane], x);
    }
  }
  TopTwo top{first[0], second[0]};
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    top.second = max(max(top.second, second[lane]), min(top.first, first[lane]));
    top.first = max(top.first, first[lane]);
  }
  return top;
}

// A[i, i] <- damped sum over j != i of max(R[j, i], 0).
TASKGROUP_INLINE double self_availability(const Messages& m, int64_t i, double damping) {
  const int64_t diagonal = i * m.width + i;
  return m.A[diagonal] * damping - (m.R[diagonal] - m.support[i]) * (1.0 - damping);
}

// A[i, k] <- damped min(0, R[k, k] + sum over j not in {i, k} of max(R[j, k], 0)).
TASKGROUP_INLINE void update_availabilities(Messages& m, int64_t i, double damping) {
  const double* __restrict r = &m.R[i * m.width];
  const double* __restrict support = m.support.data();
  double* __restrict a = &m.A[i * m.width];
  const double self = self_availability(m, i, damping), fresh = 1.0 - damping;
#pragma omp simd
  for (int64_t k = 0; k < m.width; ++k) {
    a[k] = a[k] * damping - max(max(r[k], 0.0) - support[k], 0.0) * fresh;
  }
  a[i] = self;
}

// R[i, k] <- damped S[i, k] - max over j != k of (A + S)[i, j]; adds the row to `next_support`.
TASKGROUP_INLINE void update_responsibilities(Messages& m, int64_t i, double damping,
                                              double* __restrict sum,
                                              double* __restrict next_support) {
  const double* __restrict s = &m.S[i * m.width];
  double* __restrict r = &m.R[i * m.width];
  const TopTwo top = add_top_two(&m.A[i * m.width], s, sum, m.width);
  const double others = next_support[i], fresh = 1.0 - damping;
#pragma omp simd
  for (int64_t k = 0; k < m.width; ++k) {
    // If the largest entry occurs twice, the second largest equals it, so this needs no index.
    const double rival = sum[k] == top.first ? top.second : top.first;
    r[k] = r[k] * damping + (s[k] - rival) * fresh;
    next_support[k] += max(r[k], 0.0);
  }
  next_support[i] = others + r[i];
}

// One iteration, in a single pass over memory. The availabilities that end the previous iteration
// are computed here, row by row, just before they are needed. In the first iteration they stay
// zero.
TASKGROUP_INLINE void pass_messages(Messages& m, double damping, double* scratch,
                                    double* next_support) {
  std::fill_n(next_support, m.width, 0.0);
  for (int64_t i = 0; i < m.K; ++i) {
    update_availabilities(m, i, damping);
    update_responsibilities(m, i, damping, scratch, next_support);
  }
}

void pass_messages_portable(Messages& m, double damping, double* scratch, double* next_support) {
  pass_messages(m, damping, scratch, next_support);
}

// AVX2 without FMA, so that this version and the portable one round in the same way.
#if defined(__x86_64__)
__attribute__((target("avx2"))) void pass_messages_avx2(Messages& m, double damping,
                                                        double* scratch, double* next_support) {
  pass_messages(m, damping, scratch, next_support);
}
#else
constexpr auto pass_messages_avx2 = pass_messages_portable;
#endif

// Passes messages until the exemplars stop changing. Returns the exemplars, or an empty vector if
// they do not converge.
std::vector<int64_t> find_exemplars(Messages& m, double damping, int64_t max_iter,
                                    int64_t convergence_iter, InstructionSet isa) {
  const auto pass = isa >= InstructionSet::kAvx2 ? pass_messages_avx2 : pass_messages_portable;
  std::vector<double> scratch(m.width), next_support(m.width);
  std::vector<int64_t> exemplars, previous;
  int64_t unchanged = 0;  // the number of iterations for which the exemplars have been the same
  for (int64_t iteration = 0; iteration < max_iter; ++iteration) {
    pass(m, damping, scratch.data(), next_support.data());
    m.support.swap(next_support);
    previous.swap(exemplars);
    exemplars.clear();
    for (int64_t k = 0; k < m.K; ++k) {
      const double self_responsibility = m.R[k * m.width + k];
      if (self_availability(m, k, damping) + self_responsibility > 0.0) exemplars.push_back(k);
    }
    unchanged = exemplars == previous ? unchanged + 1 : 1;
    if (iteration >= convergence_iter && unchanged >= convergence_iter && !exemplars.empty()) {
      return exemplars;
    }
  }
  return {};
}

// The cluster of every task: its most similar exemplar. An exemplar is in its own cluster.
std::vector<int64_t> assign(const Messages& m, const std::vector<int64_t>& exemplars) {
  std::vector<int64_t> cluster(m.K, 0);
  for (int64_t i = 0; i < m.K; ++i) {
    const double* s = &m.S[i * m.width];
    for (std::size_t c = 1; c < exemplars.size(); ++c) {
      if (s[exemplars[c]] > s[exemplars[cluster[i]]]) cluster[i] = static_cast<int64_t>(c);
    }
  }
  for (std::size_t c = 0; c < exemplars.size(); ++c) {
    cluster[exemplars[c]] = static_cast<int64_t>(c);
  }
  return cluster;
}

// Moves the exemplar of each cluster to the member that its members are most similar to.
std::vector<int64_t> refine(const Messages& m, std::vector<int64_t> exemplars) {
  const std::vector<int64_t> cluster = assign(m, exemplars);
  for (std::size_t c = 0; c < exemplars.size(); ++c) {
    double best = kLowest;
    for (int64_t k = 0; k < m.K; ++k) {
      if (cluster[k] != static_cast<int64_t>(c)) continue;
      double sum = 0.0;
      for (int64_t i = 0; i < m.K; ++i) {
        if (cluster[i] == static_cast<int64_t>(c)) sum += m.S[i * m.width + k];
      }
      if (sum > best) {
        best = sum;
        exemplars[c] = k;
      }
    }
  }
  return exemplars;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*std::max_element(values.begin(), middle) + *middle) / 2.0;
}

bool all_equal(const double* similarity, const std::vector<double>& preference, int64_t K) {
  for (const double p : preference) {
    if (p != preference[0]) return false;
  }
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      if (i != k && similarity[i * K + k] != similarity[1]) return false;
    }
  }
  return true;
}

}  // namespace

std::optional<std::vector<int64_t>> affinity_propagation(
    const double* similarity, const double* preference, const double* noise, int64_t K,
    double damping, int64_t max_iter, int64_t convergence_iter, InstructionSet isa) {
  const std::vector<double> preferences =
      preference != nullptr
          ? std::vector<double>(preference, preference + K)
          : std::vector<double>(K, median(std::vector<double>(similarity, similarity + K * K)));

  std::vector<int64_t> labels(K, 0);
  if (K == 1 || all_equal(similarity, preferences, K)) {
    // The messages would be the same for all tasks, so the preference decides.
    if (preferences[0] > similarity[K - 1]) std::iota(labels.begin(), labels.end(), 0);
    return labels;
  }

  Messages m(K);
  constexpr double epsilon = std::numeric_limits<double>::epsilon();
  constexpr double tiny = 100.0 * std::numeric_limits<double>::min();
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      const double s = i == k ? preferences[i] : similarity[i * K + k];
      m.S[i * m.width + k] = s + (epsilon * s + tiny) * noise[i * K + k];
    }
  }

  std::vector<int64_t> exemplars = find_exemplars(m, damping, max_iter, convergence_iter, isa);
  if (exemplars.empty()) return std::nullopt;
  exemplars = refine(m, std::move(exemplars));

  // Labels follow the order of the exemplars, which the refinement may have changed.
  std::vector<int64_t> sorted = exemplars;
  std::sort(sorted.begin(), sorted.end());
  const std::vector<int64_t> cluster = assign(m, exemplars);
  for (int64_t i = 0; i < K; ++i) {
    const auto place = std::lower_bound(sorted.begin(), sorted.end(), exemplars[cluster[i]]);
    labels[i] = place - sorted.begin();
  }
  return labels;
}

}  // namespace taskgroup
