#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace taskgroup {

const char* name_of(InstructionSet isa) {
  switch (isa) {
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kAvx512:
      return "avx512";
    default:
      return "portable";
  }
}

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  // These builtins also check that the operating system saves the wide registers.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return __builtin_cpu_supports("avx512f") ? InstructionSet::kAvx512 : InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kPortable;
}

InstructionSet choose_instruction_set(const char* name, InstructionSet best) {
  if (name == nullptr || *name == '\0') return best;
  std::string available;
  bool known = false;
  for (const InstructionSet isa : kInstructionSets) {
    known |= name == std::string(name_of(isa));
    if (isa > best) continue;
    if (name == std::string(name_of(isa))) return isa;
    available += std::string(available.empty() ? "" : ", ") + name_of(isa);
  }
  throw std::runtime_error("TASKGROUP_CPU_ISA=" + std::string(name) +
                           (known ? " names an instruction set that this processor lacks"
                                  : " names no instruction set that taskgroup knows") +
                           "; unset it, or set it to one that this processor has (" + available +
                           ").");
}

InstructionSet instruction_set() {
  static const InstructionSet chosen =
      choose_instruction_set(std::getenv("TASKGROUP_CPU_ISA"), best_instruction_set());
  return chosen;
}

}  // namespace taskgroup
