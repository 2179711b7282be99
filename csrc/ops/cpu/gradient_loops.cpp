#include "ops/cpu/gradient_loops.h"

#include <cstring>
#include <initializer_list>

namespace taskgroup {

const GradientLoops* gradient_loops(const char* isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
  if (!std::strcmp(isa, "avx512")) return avx512 ? &kAvx512Loops : nullptr;
  if (!std::strcmp(isa, "avx2")) return avx2 ? &kAvx2Loops : nullptr;
#endif
  return std::strcmp(isa, "portable") ? nullptr : &kPortableLoops;
}

const GradientLoops& gradient_loops() {
  static const GradientLoops& best = [&]() -> const GradientLoops& {
    for (const char* isa : {"avx512", "avx2"}) {
      if (const GradientLoops* loops = gradient_loops(isa)) return *loops;
    }
    return kPortableLoops;
  }();
  return best;
}

}  // namespace taskgroup
