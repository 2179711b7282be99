// CMake compiles this file for avx512bf16 and amx; it is called only on processors that have both.
#if defined(__x86_64__)
#define TASKGROUP_LOOPS kAmxLoops
#define TASKGROUP_VECTOR_BYTES 64
#define TASKGROUP_TILE 4
#define TASKGROUP_BFLOAT16
#define TASKGROUP_AMX
#include "ops/cpu/gradient_loops.inc"
#endif
