#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "instruction_set.h"

namespace taskgroup {

// Affinity propagation (Frey and Dueck, Science 315, 2007), with the same order of updates,
// rounding, convergence test, refinement and labels as in scikit-learn.
//
// Returns labels in 0..M-1, numbered in the order of the exemplars. Returns nothing if there are no
// `convergence_iter` consecutive iterations with the same exemplars within `max_iter`. The result
// is the same for every instruction set. The processor must support `isa`.
std::optional<std::vector<int64_t>> affinity_propagation(
    const double* similarity,  // [K, K] row-major, finite, K >= 1
    const double* preference,  // [K], or null for the median of `similarity`
    const double* noise,       // [K, K] standard normal, breaks ties
    int64_t K,                 //
    double damping,            // in [0.5, 1)
    int64_t max_iter,          // >= 1
    int64_t convergence_iter,  // >= 1
    InstructionSet isa = instruction_set());

}  // namespace taskgroup
