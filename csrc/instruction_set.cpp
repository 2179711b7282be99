#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace taskgroup {

namespace {

#if defined(__x86_64__)
// Whether the processor has AMX-BF16, and Linux lets this process use its registers.
bool may_use_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0)
    return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

InstructionSet best_of_avx512() {
  if (!__builtin_cpu_supports("avx512bf16")) return InstructionSet::kAvx512;
  return may_use_amx() ? InstructionSet::kAmx : InstructionSet::kAvx512Bf16;
}
#endif

}  // namespace

const char* name_of(InstructionSet isa) {
  switch (isa) {
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx512Bf16:
      return "avx512bf16";
    case InstructionSet::kAmx:
      return "amx";
    default:
      return "portable";
  }
}

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  // These builtins also check that the operating system saves the wide registers.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return __builtin_cpu_supports("avx512f") ? best_of_avx512() : InstructionSet::kAvx2;
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
