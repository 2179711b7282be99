#include "ops/cpu/gradient_loops.h"

namespace taskgroup {

const GradientLoops& gradient_loops(InstructionSet isa) {
  switch (isa) {
#if defined(__x86_64__)
    case InstructionSet::kAmx:
      return kAmxLoops;
    case InstructionSet::kAvx512Bf16:
      return kAvx512Bf16Loops;
    case InstructionSet::kAvx512:
      return kAvx512Loops;
    case InstructionSet::kAvx2:
      return kAvx2Loops;
#endif
    default:
      return kPortableLoops;
  }
}

const GradientLoops& gradient_loops() { return gradient_loops(instruction_set()); }

}  // namespace taskgroup
