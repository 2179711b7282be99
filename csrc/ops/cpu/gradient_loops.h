#pragma once

#include <cstdint>

#include "instruction_set.h"

// The innermost loops over gradients, once per instruction set. The set is chosen at run time.

namespace taskgroup {

// Rows of two blocks of tasks: n elements of each gradient, and which task of its block each is.
template <typename T>
struct GramRows {
  const T* const* data;  // [count] pointers to n elements
  const int32_t* place;  // [count], 0..ld-1, ascending
  int32_t count;
};

struct GradientLoops {
  int64_t lanes;         // floats in a vector; the n of what follows are multiples of it
  int64_t double_lanes;  // doubles in a vector

  // sums[(i * ld + j) * double_lanes + lane] += products of row i of `a` with row j of `b`; where
  // `b` is null, of `a` with itself, i <= j. At most kChain products of a lane are summed in
  // float32 before they go to the float64 sums; prefetch asks for the elements n further on.
  void (*gram_float)(const GramRows<float>& a, const GramRows<float>* b, int64_t n, double* sums,
                     int64_t ld, bool prefetch);
  void (*gram_double)(const GramRows<double>& a, const GramRows<double>* b, int64_t n, double* sums,
                      int64_t ld, bool prefetch);

  // out[x] = sum_i weights[i] * rows[i][x], in this order of i; out may be one of the rows.
  void (*combine_float)(const float* const* rows, const float* weights, int32_t count, int64_t n,
                        float* out);
  void (*combine_double)(const double* const* rows, const double* weights, int32_t count, int64_t n,
                         double* out);
  void (*combine_bfloat16)(const uint16_t* const* rows, const float* weights, int32_t count,
                           int64_t n, uint16_t* out);
  void (*combine_half)(const uint16_t* const* rows, const float* weights, int32_t count, int64_t n,
                       uint16_t* out);

  // For any n.
  void (*widen_bfloat16)(const uint16_t* from, int64_t n, float* to);
  void (*widen_half)(const uint16_t* from, int64_t n, float* to);
};

// The number of products of a lane after which the sums go to float64. It bounds the rounding error
// for every input: kChain / 2 * 2^-24 relative to |g_i| |g_j|.
constexpr int64_t kChain = 32;

// The loops of an instruction set that this processor has; by default those of instruction_set().
const GradientLoops& gradient_loops();
const GradientLoops& gradient_loops(InstructionSet isa);

#if defined(__x86_64__)
extern const GradientLoops kAvx512Loops;
extern const GradientLoops kAvx2Loops;
#endif
extern const GradientLoops kPortableLoops;

}  // namespace taskgroup
