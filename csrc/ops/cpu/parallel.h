#pragma once

#include <cstdint>
#include <functional>

namespace taskgroup {

// Calls body(begin, end) on ranges that together cover [0, n), possibly at the same time. The ops
// pass torch's parallel_for, and the tests pass a plain call or threads.
using ParallelFor =
    std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>& body)>;

}  // namespace taskgroup
