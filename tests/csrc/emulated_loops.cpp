// The loops of the largest instruction set, with its instructions emulated, so that they are tested
// on every processor.
#define TASKGROUP_LOOPS kEmulatedLoops
#define TASKGROUP_VECTOR_BYTES 64
#define TASKGROUP_TILE 4
#define TASKGROUP_BFLOAT16
#define TASKGROUP_AMX
#include "ops/cpu/gradient_loops.inc"
