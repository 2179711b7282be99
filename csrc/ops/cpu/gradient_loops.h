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

// Memory of tile_gram_bfloat16.
struct TileScratch {
  static constexpr int kGroups = 4;  // of 16 rows
  // Of 32 elements. A tile product adds 16 products in each of two chains, then the two sums, and
  // adds the result to the sum of the steps before: at most 16 + 1 + kSteps additions in float32.
  static constexpr int kSteps = 8;
  alignas(64) uint16_t left[kGroups][kSteps][16][32];
  alignas(64) uint16_t right[kGroups][kSteps][16][32];  // pairs of elements, transposed
  alignas(64) float sums[kGroups][kGroups][16][16];
};

struct GradientLoops {
  int64_t lanes;         // floats in a vector; n is a multiple of it in gram_* and combine_*
  int64_t double_lanes;  // doubles in a vector

  // sums[(i * ld + j) * double_lanes + lane] += products of row i of `a` with row j of `b`. If `b`
  // is null, the products are those of the rows i <= j of `a`. Each lane adds the products in
  // float32, in chains of kChain products, then the sums of the chains, and adds the result to the
  // float64 sums. n is at most gram_chunk(). `prefetch` also fetches the elements that follow the n
  // elements.
  void (*gram_float)(const GramRows<float>& a, const GramRows<float>* b, int64_t n, double* sums,
                     int64_t ld, bool prefetch);
  void (*gram_double)(const GramRows<double>& a, const GramRows<double>* b, int64_t n, double* sums,
                      int64_t ld, bool prefetch);
  // From bfloat16, with 2 * lanes elements in a vector. Null if the instruction set has no products
  // of bfloat16.
  void (*gram_bfloat16)(const GramRows<uint16_t>& a, const GramRows<uint16_t>* b, int64_t n,
                        double* sums, int64_t ld, bool prefetch);
  // pairs[i * 64 + j] += the same products, of up to 64 rows; faster than gram_bfloat16 for more
  // than 16 rows. Null if the instruction set has no matrix tiles.
  void (*tile_gram_bfloat16)(const GramRows<uint16_t>& a, const GramRows<uint16_t>* b, int64_t n,
                             double* pairs, TileScratch& scratch, bool prefetch);

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

// The products that a lane adds one after the other. A chunk has at most four chains, so no product
// passes through more than kMostAdditions roundings in float32 before it is part of a float64 sum.
// The error is at most kMostAdditions * 2^-24 |g_i| |g_j|, and half of that, which is less than
// 1e-6, if all products have one size.
constexpr int64_t kChain = 28, kMostAdditions = kChain + 4;
static_assert(16 + 1 + TileScratch::kSteps <= kMostAdditions);

// The most elements of T that one call of gram_* takes. Two panels of rows of this length fit into
// the L1 cache, and all rows of a block into the L2 cache.
template <typename T>
constexpr int64_t gram_chunk(int64_t lanes) {
  return kChain * lanes * (lanes * static_cast<int64_t>(sizeof(T)) == 64 ? 2 : 4);
}

// The loops for an instruction set, which this processor must have. The default is
// instruction_set().
const GradientLoops& gradient_loops();
const GradientLoops& gradient_loops(InstructionSet isa);

#if defined(__x86_64__)
extern const GradientLoops kAmxLoops;
extern const GradientLoops kAvx512Bf16Loops;
extern const GradientLoops kAvx512Loops;
extern const GradientLoops kAvx2Loops;
#endif
extern const GradientLoops kPortableLoops;

}  // namespace taskgroup
