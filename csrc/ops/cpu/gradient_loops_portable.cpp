// The loops for the vectors of every processor of the architecture: SSE2 on x86-64, NEON on ARM.
#define TASKGROUP_LOOPS kPortableLoops
#define TASKGROUP_VECTOR_BYTES 16
#if defined(__aarch64__)
#define TASKGROUP_TILE 4  // 32 vector registers
#else
#define TASKGROUP_TILE 3
#endif
#include "ops/cpu/gradient_loops.inc"
