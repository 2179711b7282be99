#include <torch/csrc/stable/library.h>

#include <string>

#include "ops/cpu/gradient_loops.h"

namespace taskgroup {
namespace {

// "avx512", "avx2" or "portable": what the loops over gradients run on here.
std::string cpu_instruction_set() { return gradient_loops().isa; }

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_FRAGMENT(taskgroup, library) { library.def("cpu_instruction_set() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_set", TORCH_BOX(&taskgroup::cpu_instruction_set));
}
