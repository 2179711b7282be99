#pragma once

namespace taskgroup {

// The instruction sets that the hottest loops are compiled for. One of them is chosen at run time.
// Each includes the ones before it.
enum class InstructionSet {
  kPortable,    // on every processor of the architecture: SSE2 on x86-64, NEON on ARM
  kAvx2,        // AVX2, FMA and F16C
  kAvx512,      // AVX-512F
  kAvx512Bf16,  // AVX512_BF16: products of bfloat16
  kAmx,         // AMX-BF16: products of matrix tiles of bfloat16
};

constexpr InstructionSet kInstructionSets[] = {InstructionSet::kPortable, InstructionSet::kAvx2,
                                               InstructionSet::kAvx512, InstructionSet::kAvx512Bf16,
                                               InstructionSet::kAmx};

// "portable", "avx2", "avx512", "avx512bf16" or "amx".
const char* name_of(InstructionSet isa);

// The largest instruction set that the processor, the operating system and this build support.
InstructionSet best_instruction_set();

// The instruction set of this name, or `best` if the name is null or empty. Throws
// std::runtime_error if there is none of this name, or if it is larger than `best`; the message
// names TASKGROUP_CPU_ISA.
InstructionSet choose_instruction_set(const char* name, InstructionSet best);

// The instruction set of this process: the best one, or the one that the environment variable
// TASKGROUP_CPU_ISA names at the first call. Throws as above.
InstructionSet instruction_set();

}  // namespace taskgroup
