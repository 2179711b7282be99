#pragma once

#include <cstdint>
#include <functional>

namespace taskgroup {

// Calls body(begin, end) on ranges that together cover [0, n), perhaps at the same time: torch's
// parallel_for in the ops, a plain call or threads in the tests.
using ParallelFor =
    std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>& body)>;

}  // namespace taskgroup
