#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "check.h"

using namespace taskgroup;

namespace {

template <typename Function>
std::string refusal(const Function& function) {
  try {
    function();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void test_choice() {
  for (const InstructionSet best : kInstructionSets) {
    CHECK(choose_instruction_set(nullptr, best) == best);
    CHECK(choose_instruction_set("", best) == best);
    for (const InstructionSet isa : kInstructionSets) {
      const auto choose = [&] { return choose_instruction_set(name_of(isa), best); };
      if (isa <= best) {
        CHECK(choose() == isa);
      } else {
        CHECK(refusal(choose).find("this processor lacks") != std::string::npos);
      }
    }
  }
  const auto refused = [](const char* name) {
    return refusal([&] { choose_instruction_set(name, InstructionSet::kAvx2); });
  };
  CHECK(refused("avx512") ==
        "TASKGROUP_CPU_ISA=avx512 names an instruction set that this processor lacks; unset it, "
        "or set it to one that this processor has (portable, avx2).");
  for (const char* name : {"AVX2", "avx", "avx2 ", "none"}) {
    CHECK(refused(name).find("names no instruction set that taskgroup knows") != std::string::npos);
  }
}

// The process reads the variable once, at the first call that succeeds.
void test_environment() {
  setenv("TASKGROUP_CPU_ISA", "avx1024", 1);
  CHECK(refusal(instruction_set).find("TASKGROUP_CPU_ISA=avx1024 ") == 0);
  setenv("TASKGROUP_CPU_ISA", "portable", 1);
  CHECK(instruction_set() == InstructionSet::kPortable);
  unsetenv("TASKGROUP_CPU_ISA");
  CHECK(instruction_set() == InstructionSet::kPortable);
}

}  // namespace

int main() {
  test_choice();
  test_environment();
}
