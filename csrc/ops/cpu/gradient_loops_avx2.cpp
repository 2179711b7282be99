// CMake compiles this file for avx2; it is called only on processors that have it.
#if defined(__x86_64__)
#define TASKGROUP_LOOPS kAvx2Loops
#define TASKGROUP_VECTOR_BYTES 32
#define TASKGROUP_TILE 3
#include "ops/cpu/gradient_loops.inc"
#endif
