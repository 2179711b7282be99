#pragma once

#include <cstdint>

#include "instruction_set.h"

// The innermost loops over gradients, compiled once for each instruction set. The set is chosen at
// run time.

namespace taskgroup {

// The gradients of a block of tasks, n elements each, and the index of each task in its block.
template <typename T>
struct GramRows {
  const T* const* data;  // [count] pointers to n elements
  const int32_t* place;  // [count], 0..ld-1, ascending
  int32_t count;
};

struct GradientLoops {
  int64_t lanes;         // floats in a vector; n is a multiple of it in gram_* and combine_*
  int64_t double_lanes;  // doubles in a vector

  // sums[(i * ld + j) * double_lanes + lane] += products of row i of `a` with row j of `b`. If `b`
  // is null, the products are those of the rows i <= j of `a`. Each lane sums at most kChain
  // products in float32 before it adds them to the float64 sums. `prefetch` also fetches the
  // elements that follow the n elements.
  void (*gram_float)(const GramRows<float>& a, const GramRows<float>* b, int64_t n, double* sums,
                     int64_t ld, bool prefetch);
  void (*gram_double)(const GramRows<double>& a, const GramRows<double>* b, int64_t n, double* sums,
                      int64_t ld, bool prefetch);

  // out[x] = sum_i weights[i] * rows[i][x], added in the order of i. `out` may be one of the rows.
  void (*combine_float)(const float* const* rows, const float* weights, int32_t count, int64_t n,
                        float* out);
  void (*combine_double)(const double* const* rows, const double* weights, int32_t count, int64_t n,
                         double* out);
  void (*combine_bfloat16)(const uint16_t* const* rows, const float* weights, int32_t count,
                           int64_t n, uint16_t* out);
  void (*combine_half)(const uint16_t* const* rows, const float* weights, int32_t count, int64_t n,
                       uint16_t* out);

  // These take any n.
  void (*widen_bfloat16)(const uint16_t* from, int64_t n, float* to);
  void (*widen_half)(const uint16_t* from, int64_t n, float* to);
};

// The number of products that a lane sums in float32 before it adds them to float64. It bounds the
// rounding error for every input by kChain / 2 * 2^-24 |g_i| |g_j|.
constexpr int64_t kChain = 32;

// The loops for an instruction set, which this processor must have. The default is
// instruction_set().
const GradientLoops& gradient_loops();
const GradientLoops& gradient_loops(InstructionSet isa);

#if defined(__x86_64__)
extern const GradientLoops kAvx512Loops;
extern const GradientLoops kAvx2Loops;
#endif
extern const GradientLoops kPortableLoops;

}  // namespace taskgroup
