#pragma once

namespace taskgroup {

// The instruction sets that the hottest loops are compiled for; which of them runs is chosen at run
// time. Each includes the ones before it.
enum class InstructionSet {
  kPortable,  // what every processor of the architecture has: SSE2 on x86-64, NEON on ARM
  kAvx2,      // AVX2 and FMA
  kAvx512,    // AVX-512F
};

constexpr InstructionSet kInstructionSets[] = {InstructionSet::kPortable, InstructionSet::kAvx2,
                                               InstructionSet::kAvx512};

// "portable", "avx2" or "avx512".
const char* name_of(InstructionSet isa);

// The largest one that this processor, its operating system and this build have.
InstructionSet best_instruction_set();

// The one of this name, or `best` where the name is null or empty. Throws std::runtime_error where
// there is none of this name, or only beyond `best`; the message speaks of TASKGROUP_CPU_ISA.
InstructionSet choose_instruction_set(const char* name, InstructionSet best);

// The one that this process runs: the best, or what the environment variable TASKGROUP_CPU_ISA
// names when this is first called. Throws as above.
InstructionSet instruction_set();

}  // namespace taskgroup
