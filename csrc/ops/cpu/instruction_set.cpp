#include "instruction_set.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace taskgroup {
namespace {

// The instruction set of the loops over gradients: "avx512", "avx2" or "portable".
std::string cpu_instruction_set() { return name_of(instruction_set()); }

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_FRAGMENT(taskgroup, library) { library.def("cpu_instruction_set() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_set", TORCH_BOX(&taskgroup::cpu_instruction_set));
}
