#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "instruction_set.h"

namespace taskgroup {

// Affinity propagation (Frey and Dueck, Science 315, 2007) with the semantics of scikit-learn's:
// same order of updates, same rounding, same convergence test, same refinement, same labels.
//
// Returns labels in 0..M-1, numbered in the order of the exemplars, or nothing if the exemplars did
// not stay the same for `convergence_iter` iterations within `max_iter`. The result is the same on
// every instruction set; the processor must have `isa`.
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
