#include "host/affinity_propagation.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>

// The message passing is compiled once for each instruction set. This works only if all of its code
// is inlined into one function.
#define TASKGROUP_INLINE inline __attribute__((always_inline))

namespace taskgroup {

namespace {

constexpr int64_t kLanes = 4;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

TASKGROUP_INLINE double max(double a, double b) { return a > b ? a : b; }
TASKGROUP_INLINE double min(double a, double b) { return a < b ? a : b; }

struct TopTwo {
  double first = -kInfinity, second = -kInfinity;  // may be equal

  TASKGROUP_INLINE void add(double x) {
    second = max(second, min(first, x));
    first = max(first, x);
  }
};

// Messages between one task and several others: similarities, responsibilities, availabilities, and
// the other tasks. A lane that is not used is never the largest and sends no message (R = -inf).
struct Candidates {
  double s[kLanes], r[kLanes], a[kLanes];
  double positive[kLanes];  // max(r, 0)
  int64_t k[kLanes];
};

// The messages between a task and itself, and those with its candidates.
struct Row {
  double s, r = 0.0, a = 0.0;
  int64_t n = 0;  // the number of candidates
  std::vector<Candidates> candidates;

  void add(double similarity, double responsibility, double availability, int64_t k) {
    const int64_t lane = n++ % kLanes;
    if (lane == 0) {
      candidates.emplace_back();  // all zero
      std::fill_n(candidates.back().s, kLanes, -kInfinity);
    }
    Candidates& last = candidates.back();
    last.s[lane] = similarity;
    last.r[lane] = responsibility;
    last.a[lane] = availability;
    last.positive[lane] = max(responsibility, 0.0);
    last.k[lane] = k;
  }
};

// Most messages follow from a few numbers. As long as S[i, k] has never exceeded the second largest
// entry of row i of A + S,
//
//   R[i, k] <- damped S[i, k] - (the largest entry of row i)    is not positive, and
//   A[i, k] <- damped min(0, support[k])                        is the same for all these i.
//
// Such a message is not needed to find the two largest entries, and adds nothing to `support`. Once
// S[i, k] exceeds the second largest entry, k becomes a candidate of i: its messages are computed
// from the first iteration on, operation by operation, and are rounded as if they had been computed
// all along.
struct Messages {
  int64_t K;
  double damping;
  std::unique_ptr<double[]> S;        // [K, K] similarities
  std::vector<Row> rows;              // [K]
  std::vector<double> largest_other;  // [K] the largest similarity to a task that is no candidate
  // [K] For each column k, the sum of R[k, k] and of max(R[j, k], 0) over all j != k.
  std::vector<double> support, next_support;
  std::vector<double> availability;          // [K] A[i, k] where k is no candidate of i
  std::vector<std::vector<double>> largest;  // [iterations][K] the largest entry of each row

  Messages(int64_t K, double damping)
      : K(K),
        damping(damping),
        S(new double[K * K]),
        rows(K),
        largest_other(K, kInfinity),
        support(K, 0.0),
        next_support(K),
        availability(K, 0.0) {}
};

// A[k, k] <- damped sum over j != k of max(R[j, k], 0).
TASKGROUP_INLINE double self_availability(const Messages& m, int64_t k) {
  const Row& row = m.rows[k];
  return row.a * m.damping + (m.support[k] - row.r) * (1.0 - m.damping);
}

// A[i, k] <- damped min(0, R[k, k] + sum over j not in {i, k} of max(R[j, k], 0)) for the
// candidates k of i. Returns the two largest of A + S among them.
TASKGROUP_INLINE TopTwo update_availabilities(Row& row, const double* support, double damping) {
  const double fresh = 1.0 - damping;
  double first[kLanes], second[kLanes];
  std::fill_n(first, kLanes, -kInfinity);
  std::fill_n(second, kLanes, -kInfinity);
  for (Candidates& c : row.candidates) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double others = support[c.k[lane]] - c.positive[lane];
      c.a[lane] = c.a[lane] * damping + min(others, 0.0) * fresh;
      const double x = c.a[lane] + c.s[lane];
      second[lane] = max(second[lane], min(first[lane], x));
      first[lane] = max(first[lane], x);
    }
  }
  TopTwo top;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    top.add(first[lane]);
    top.second = max(top.second, second[lane]);
  }
  return top;
}

// R[i, k] <- damped S[i, k] - max over j != k of (A + S)[i, j].
TASKGROUP_INLINE double responsibility(double s, double r, double a, TopTwo top, double damping) {
  // If the largest entry occurs twice, the second largest equals it, so this needs no index.
  const double rival = a + s == top.first ? top.second : top.first;
  return r * damping + (s - rival) * (1.0 - damping);
}

// Updates the responsibilities of a row, and adds it to the support.
TASKGROUP_INLINE void update_responsibilities(Row& row, int64_t i, TopTwo top, double damping,
                                              double* __restrict support) {
  for (Candidates& c : row.candidates) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      c.r[lane] = responsibility(c.s[lane], c.r[lane], c.a[lane], top, damping);
      c.positive[lane] = max(c.r[lane], 0.0);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) support[c.k[lane]] += c.positive[lane];
  }
  row.r = responsibility(row.s, row.r, row.a, top, damping);
  support[i] += row.r;
}

// Adds the tasks whose similarity exceeds the second largest entry of A + S to the candidates.
// `top` are the largest entries of the candidates so far; returns those of all tasks.
TopTwo add_candidates(Messages& m, int64_t i, TopTwo top) {
  double* s = &m.S[i * m.K];
  const double* a = m.availability.data();
  const double limit = m.largest_other[i], self = s[i], damping = m.damping;
  s[i] = std::numeric_limits<double>::quiet_NaN();  // within no limit: it is a candidate
  for (int64_t k = 0; k < m.K; ++k) {
    if (s[k] <= limit && a[k] + s[k] > top.second) top.add(a[k] + s[k]);
  }
  double largest_other = -kInfinity;
  for (int64_t k = 0; k < m.K; ++k) {
    if (s[k] <= limit && s[k] > top.second) {
      double r = 0.0;
      for (const auto& largest : m.largest) r = r * damping + (s[k] - largest[i]) * (1.0 - damping);
      m.rows[i].add(s[k], r, a[k], k);
    } else if (s[k] <= limit && s[k] > largest_other) {
      largest_other = s[k];
    }
  }
  s[i] = self;
  m.largest_other[i] = largest_other;
  return top;
}

// One iteration. The availabilities that end the previous iteration are computed here, just before
// they are needed. In the first iteration they stay zero.
TASKGROUP_INLINE void pass_messages(Messages& m) {
  const double damping = m.damping, fresh = 1.0 - damping;
  for (int64_t k = 0; k < m.K; ++k) {
    m.availability[k] = m.availability[k] * damping + min(m.support[k], 0.0) * fresh;
  }
  std::fill(m.next_support.begin(), m.next_support.end(), 0.0);
  std::vector<double> largest(m.K);
  for (int64_t i = 0; i < m.K; ++i) {
    Row& row = m.rows[i];
    row.a = self_availability(m, i);
    TopTwo top = update_availabilities(row, m.support.data(), damping);
    top.add(row.a + row.s);
    if (m.largest_other[i] > top.second) top = add_candidates(m, i, top);
    largest[i] = top.first;
    update_responsibilities(row, i, top, damping, m.next_support.data());
  }
  m.largest.push_back(std::move(largest));
  m.support.swap(m.next_support);
}

void pass_messages_portable(Messages& m) { pass_messages(m); }

// AVX2 without FMA, so that this version and the portable one round in the same way.
#if defined(__x86_64__)
__attribute__((target("avx2"))) void pass_messages_avx2(Messages& m) { pass_messages(m); }
#else
constexpr auto pass_messages_avx2 = pass_messages_portable;
#endif

// Passes messages until the exemplars stop changing. Returns the exemplars, or an empty vector if
// they do not converge.
std::vector<int64_t> find_exemplars(Messages& m, int64_t max_iter, int64_t convergence_iter,
                                    InstructionSet isa) {
  const auto pass = isa >= InstructionSet::kAvx2 ? pass_messages_avx2 : pass_messages_portable;
  for (int64_t i = 0; i < m.K; ++i) m.rows[i].s = m.S[i * m.K + i];
  std::vector<int64_t> exemplars, previous;
  int64_t unchanged = 0;  // the number of iterations for which the exemplars have been the same
  for (int64_t iteration = 0; iteration < max_iter; ++iteration) {
    pass(m);
    previous.swap(exemplars);
    exemplars.clear();
    for (int64_t k = 0; k < m.K; ++k) {
      if (self_availability(m, k) + m.rows[k].r > 0.0) exemplars.push_back(k);
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
    const double* s = &m.S[i * m.K];
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
  std::vector<std::vector<int64_t>> members(exemplars.size());
  for (int64_t i = 0; i < m.K; ++i) members[cluster[i]].push_back(i);
  std::vector<double> sum(m.K, 0.0);  // over the members of the cluster of k
  for (int64_t i = 0; i < m.K; ++i) {
    for (const int64_t k : members[cluster[i]]) sum[k] += m.S[i * m.K + k];
  }
  for (std::size_t c = 0; c < exemplars.size(); ++c) {
    double best = -kInfinity;
    for (const int64_t k : members[c]) {
      if (sum[k] > best) {
        best = sum[k];
        exemplars[c] = k;
      }
    }
  }
  return exemplars;
}

// The median of n numbers. Of very many, only those close to the median of a sample are sorted.
double median(const double* values, int64_t n) {
  constexpr int64_t kSample = 512, kMargin = 45;  // four standard deviations of the place
  double low = -kInfinity, high = kInfinity;
  if (n > 8 * kSample) {
    std::vector<double> sample(kSample);
    for (int64_t x = 0; x < kSample; ++x) sample[x] = values[x * n / kSample];
    std::sort(sample.begin(), sample.end());
    low = sample[kSample / 2 - kMargin];
    high = sample[kSample / 2 + kMargin];
  }
  const std::unique_ptr<double[]> close(new double[n + 1]);
  for (;;) {
    int64_t below = 0, n_close = 0;
    for (int64_t x = 0; x < n; ++x) {
      below += values[x] < low;
      close[n_close] = values[x];
      n_close += static_cast<int>(low <= values[x]) & static_cast<int>(values[x] <= high);
    }
    const int64_t middle = n / 2 - below, before = (n - 1) / 2 - below;
    if (before >= 0 && middle < n_close) {
      double* const end = close.get() + n_close;
      std::nth_element(close.get(), &close[middle], end);
      if (before == middle) return close[middle];
      return (*std::max_element(close.get(), &close[middle]) + close[middle]) / 2.0;
    }
    low = -kInfinity;  // the sample was misleading
    high = kInfinity;
  }
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
  const std::vector<double> preferences = preference != nullptr
                                              ? std::vector<double>(preference, preference + K)
                                              : std::vector<double>(K, median(similarity, K * K));

  std::vector<int64_t> labels(K, 0);
  if (K == 1 || all_equal(similarity, preferences, K)) {
    // The messages would be the same for all tasks, so the preference decides.
    if (preferences[0] > similarity[K - 1]) std::iota(labels.begin(), labels.end(), 0);
    return labels;
  }

  Messages m(K, damping);
  constexpr double epsilon = std::numeric_limits<double>::epsilon();
  constexpr double tiny = 100.0 * std::numeric_limits<double>::min();
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      const double s = i == k ? preferences[i] : similarity[i * K + k];
      m.S[i * m.K + k] = s + (epsilon * s + tiny) * noise[i * K + k];
    }
  }

  std::vector<int64_t> exemplars = find_exemplars(m, max_iter, convergence_iter, isa);
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
