// CMake compiles this file for avx512; it is called only on processors that have it.
#if defined(__x86_64__)
#define TASKGROUP_LOOPS kAvx512Loops
#define TASKGROUP_VECTOR_BYTES 64
#define TASKGROUP_TILE 4
#include "ops/cpu/gradient_loops.inc"
#endif
