#pragma once

// Runs CUDA kernels on the host, with one std::thread per CUDA thread and one block after the
// other. The functions of the hardware are implemented in the simplest way, so that the tests
// exercise the logic of the kernels. The thread sanitizer reports a missing barrier as a data race.

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))

using std::isfinite;
using std::isnan;

namespace shim {

// Waits for all threads of a block or warp. It uses Linux's futex, because the tests spend most of
// their time here, and a condition variable takes four times as long.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}

  void wait() {
    const uint32_t turn = turn_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      waiting_.store(0, std::memory_order_relaxed);
      turn_.fetch_add(1, std::memory_order_acq_rel);
      syscall(SYS_futex, &turn_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    } else {
      while (turn_.load(std::memory_order_acquire) == turn) {
        syscall(SYS_futex, &turn_, FUTEX_WAIT_PRIVATE, turn, nullptr, nullptr, 0);
      }
    }
  }

 private:
  const unsigned threads_;
  std::atomic<uint32_t> waiting_{0}, turn_{0};
};

// Threads that exchange values. They alternate between two sets of slots, because a slow thread may
// still read the old values while others write the next ones.
struct Team {
  explicit Team(int threads) : barrier(threads), slots{std::vector<Slot>(threads), {}} {
    slots[1].resize(threads);
  }

  struct Slot {
    unsigned char bytes[32];
  };

  Barrier barrier;
  std::vector<Slot> slots[2];
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

inline thread_local Index thread, block;
inline thread_local Team *everyone, *warp;
inline thread_local int turn_of_everyone, turn_of_warp;
inline Index threads_of_block, blocks_of_grid;

template <typename T>
const Team::Slot* exchange(Team* team, int& turn, int place, const T& value) {
  static_assert(sizeof(T) <= sizeof(Team::Slot), "");
  auto& slots = team->slots[turn];
  turn ^= 1;
  std::memcpy(slots[place].bytes, &value, sizeof(T));
  team->barrier.wait();
  return slots.data();
}

// The values of type T that the lanes of a warp have exchanged.
template <typename T>
struct Shown {
  const Team::Slot* slots;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots[lane].bytes, sizeof(T));
    return value;
  }
};

template <typename T>
Shown<T> show_warp(const T& value) {
  return {exchange(warp, turn_of_warp, thread.x % 32, value)};
}

// Calls kernel(shared) in every thread of every block. Shared memory is filled with NaN first.
template <typename Kernel>
void launch(Index blocks, int threads, size_t shared_bytes, const Kernel& kernel) {
  threads_of_block = {static_cast<unsigned>(threads), 1, 1};
  blocks_of_grid = blocks;
  struct alignas(128) Line {
    unsigned char bytes[128];
  };
  std::vector<Line> shared(shared_bytes / sizeof(Line) + 1);
  Team all(threads);
  std::vector<std::unique_ptr<Team>> warps;
  for (int w = 0; w * 32 < threads; ++w) warps.push_back(std::make_unique<Team>(32));
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      thread = {static_cast<unsigned>(t), 0, 0};
      everyone = &all;
      warp = warps[t / 32].get();
      turn_of_everyone = turn_of_warp = 0;
      for (unsigned y = 0; y < blocks.y; ++y) {
        for (unsigned x = 0; x < blocks.x; ++x) {
          block = {x, y, 0};
          if (t == 0) std::memset(shared.data(), 0xff, shared.size() * sizeof(Line));
          all.barrier.wait();
          kernel(static_cast<void*>(shared.data()));
          all.barrier.wait();
        }
      }
    });
  }
  for (std::thread& one : pool) one.join();
}

}  // namespace shim

#define threadIdx shim::thread
#define blockIdx shim::block
#define blockDim shim::threads_of_block
#define gridDim shim::blocks_of_grid

inline void __syncthreads() { shim::everyone->barrier.wait(); }

inline int __syncthreads_count(bool value) {
  const auto* slots = shim::exchange(shim::everyone, shim::turn_of_everyone, shim::thread.x, value);
  int count = 0;
  for (unsigned t = 0; t < blockDim.x; ++t) count += slots[t].bytes[0];
  return count;
}

inline void __syncwarp() { shim::warp->barrier.wait(); }

inline unsigned __ballot_sync(unsigned, bool value) {
  const auto shown = shim::show_warp(value);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(shown[lane]) << lane;
  return all;
}

inline int __popc(unsigned word) { return __builtin_popcount(word); }

inline bool __any_sync(unsigned, bool value) {
  const auto shown = shim::show_warp(value);
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) any |= shown[lane];
  return any;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shim::show_warp(value)[(shim::thread.x % 32) ^ mask];
}

namespace taskgroup {

inline double multiply(double a, double b) { return a * b; }
inline double add(double a, double b) { return a + b; }

struct alignas(16) Words {
  uint32_t word[4];
};

inline void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 == 0) return;
  std::fprintf(stderr, "16 bytes were accessed at an address that is not aligned to 16\n");
  std::abort();
}

inline Words load_words(const void* from) {
  check_aligned(from);
  Words words;
  std::memcpy(&words, from, sizeof(words));
  return words;
}

template <bool kNeighbours = false>
inline Words stream_words(const void* from, bool there) {
  return there ? load_words(from) : Words{};
}

inline double load_double(const double* from, bool there) { return there ? *from : 0.0; }

inline void store_words(void* to, Words words) {
  check_aligned(to);
  std::memcpy(to, &words, sizeof(words));
}

inline float widen_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(1024.0f + fraction, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline uint16_t narrow_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  // Work in units of the last place. A carry changes the exponent correctly.
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units));
}

inline uint16_t narrow_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t narrow_bfloat16_pair(float low, float high) {
  return narrow_bfloat16(low) | static_cast<uint32_t>(narrow_bfloat16(high)) << 16;
}

inline float widen_bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// Uses the layout of m16n8k16 in the PTX manual. Sums are computed in float64 and rounded once.
template <typename Widen>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Widen& widen) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const auto shown = shim::show_warp(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = shim::thread.x % 32;
  const auto half = [&](uint32_t word, int which) {
    return static_cast<double>(widen(static_cast<uint16_t>(word >> 16 * which)));
  };
  const auto a_at = [&](int row, int k) {
    return half(shown[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2);
  };
  const auto b_at = [&](int k, int column) {
    return half(shown[column * 4 + k % 8 / 2].b[k / 8], k % 2);
  };
  for (int c = 0; c < 4; ++c) {
    const int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
    double sum = d[c];
    for (int k = 0; k < 16; ++k) sum += a_at(row, k) * b_at(k, column);
    d[c] = static_cast<float>(sum);
  }
}

inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma(d, a, b, widen_bfloat16);
}

inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma(d, a, b, widen_half);
}

// An mbarrier is one word. From the lowest bits, it holds the bytes that are still expected, the
// arrivals that are still missing in this phase, the arrivals of every phase, and the parity of the
// phase. A copy is done immediately when it is requested. So the thread sanitizer detects a thread
// that still reads the old data, or that reads the new data without waiting.
constexpr bool kHasBulkCopies = true;

constexpr uint64_t kBytes = (1ull << 32) - 1, kArrival = 1ull << 32, kArrivals = 0xffull << 32;

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  __atomic_store_n(barrier, arrivals * (kArrival | kArrival << 8), __ATOMIC_RELEASE);
}

// Applies change(word) atomically, and starts the next phase if this one is now complete.
template <typename Change>
void mbarrier_change(uint64_t* barrier, const Change& change) {
  uint64_t word = __atomic_load_n(barrier, __ATOMIC_ACQUIRE), next;
  do {
    next = change(word);
    if ((next & (kBytes | kArrivals)) == 0) next = (next | (next >> 8 & kArrivals)) ^ 1ull << 63;
  } while (
      !__atomic_compare_exchange_n(barrier, &word, next, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
}

inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  mbarrier_change(barrier, [=](uint64_t word) {
    if ((word & kArrivals) == 0) std::abort();  // one arrival too many
    return word - kArrival + bytes;
  });
}

inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_expect(barrier, 0); }

inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (__atomic_load_n(barrier, __ATOMIC_ACQUIRE) >> 63 == parity) sched_yield();
}

inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  check_aligned(to);
  check_aligned(from);
  if (bytes % 16 != 0) std::abort();
  std::memcpy(to, from, bytes);
  mbarrier_change(barrier, [=](uint64_t word) {
    if ((word & kBytes) < bytes) std::abort();  // more bytes than expected
    return word - bytes;
  });
}

}  // namespace taskgroup
