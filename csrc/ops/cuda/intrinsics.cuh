#pragma once

// Small functions that wrap everything specific to CUDA. tests/csrc/cuda_shim.h defines the same
// functions for the host, so that the kernels also compile as plain C++.

#include <cstdint>

#ifndef __CUDACC__
#include "cuda_shim.h"
#else

namespace taskgroup {

// CUDA arithmetic that does not fuse multiplication and addition.
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }

struct alignas(16) Words {
  uint32_t word[4];
};

// 16 aligned bytes.
__device__ inline Words load_words(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}

// Loads 16 aligned bytes of global memory that are used only once. Returns zeros if `there` is
// false. It does not branch. With kNeighbours the 256 bytes around them are also fetched into the
// L2 cache for later reads.
template <bool kNeighbours = false>
__device__ inline Words stream_words(const void* from, bool there) {
  Words words = {};
  const size_t address = __cvta_generic_to_global(from);
  const uint32_t is_there = there;
  if constexpr (kNeighbours) {
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.u32 there, %5, 0;\n"
        "@there ld.global.L1::no_allocate.L2::256B.v4.b32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "+r"(words.word[0]), "+r"(words.word[1]), "+r"(words.word[2]), "+r"(words.word[3])
        : "l"(address), "r"(is_there));
  } else {
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.u32 there, %5, 0;\n"
        "@there ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "+r"(words.word[0]), "+r"(words.word[1]), "+r"(words.word[2]), "+r"(words.word[3])
        : "l"(address), "r"(is_there));
  }
  return words;
}

// Loads a number from global memory without a branch. Returns zero if `there` is false.
__device__ inline double load_double(const double* from, bool there) {
  double number = 0;
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "setp.ne.u32 there, %2, 0;\n"
      "@there ld.global.f64 %0, [%1];\n"
      "}"
      : "+d"(number)
      : "l"(__cvta_generic_to_global(from)), "r"(static_cast<uint32_t>(there)));
  return number;
}

// Writes 16 aligned bytes of global memory in one access.
__device__ inline void store_words(void* to, Words words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words.word[0]), "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3])
               : "memory");
}

__device__ inline float widen_half(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline uint16_t narrow_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline uint16_t narrow_bfloat16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Two floats rounded to bfloat16, `low` in the lower half.
__device__ inline uint32_t narrow_bfloat16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// d [16, 8] += a [16, 16] b [16, 8], computed by a warp. Each word holds two adjacent elements, the
// first one in the lower half. With g = lane / 4 and t = lane % 4, a lane holds these elements, in
// this order:
//
//   a  columns 2t and 2t+1 of row g, then of row g+8; columns 2t+8 and 2t+9 of row g, then of g+8
//   b  rows 2t and 2t+1 of column g, then rows 2t+8 and 2t+9 of it
//   d  columns 2t and 2t+1 of row g, then of row g+8
__device__ inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// The copy engine copies whole rows. One thread requests a copy, and an mbarrier in shared memory
// tells all threads when the rows have arrived.

constexpr bool kHasBulkCopies = true;

__device__ inline uint32_t shared_address(const void* in_shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(in_shared));
}

// Initialises a barrier. A phase is complete after this many arrivals, when all bytes that they
// expect have arrived too. The copy engine can use the barrier at once, and the other threads of
// the block can use it after a __syncthreads().
__device__ inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives at a barrier. The reads and writes of this thread before it take effect before those of
// other threads after they have waited for this phase.
__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives at a barrier, and tells it to expect this many bytes.
__device__ inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits until the phase of this parity is complete. The parity of the first phase is 0; the phase
// before it counts as complete.
__device__ inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (complete == 0) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Both addresses and the size are multiples of 16.
__device__ inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
#else
constexpr bool kHasBulkCopies = false;
__device__ inline void mbarrier_init(uint64_t*, uint32_t) {}
__device__ inline void mbarrier_arrive(uint64_t*) {}
__device__ inline void mbarrier_expect(uint64_t*, uint32_t) {}
__device__ inline void mbarrier_wait(uint64_t*, uint32_t) {}
__device__ inline void bulk_copy(void*, const void*, uint32_t, uint64_t*) {}
#endif

}  // namespace taskgroup

#endif
