// CMake compiles this file for avx512 and avx512bf16; it is called only on processors that have
// both.
#if defined(__x86_64__)
#define TASKGROUP_LOOPS kAvx512Bf16Loops
#define TASKGROUP_VECTOR_BYTES 64
#define TASKGROUP_TILE 4
#define TASKGROUP_BFLOAT16
#include "ops/cpu/gradient_loops.inc"
#endif
