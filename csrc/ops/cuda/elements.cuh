#pragma once

// The element types of gradients, and 16 bytes of them at a time.

#include "ops/cuda/intrinsics.cuh"

namespace taskgroup {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// The type of the sums of T.
template <typename T>
struct Wide {
  using type = float;
};

template <>
struct Wide<double> {
  using type = double;
};

template <typename T>
using wide_t = typename Wide<T>::type;

template <typename To, typename From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(Half value) { return widen_half(value.bits); }
__device__ inline float widen(BFloat16 value) {
  return bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}

template <typename T>
__device__ inline T narrow(wide_t<T> value) {
  return value;
}
template <>
__device__ inline Half narrow<Half>(float value) {
  return {narrow_half(value)};
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float value) {
  return {narrow_bfloat16(value)};
}

template <typename T>
constexpr int kPerVector = 16 / sizeof(T);  // elements in 16 bytes

template <typename T>
struct alignas(16) Vector {
  T at[kPerVector<T>];
};

// From an address aligned to 16 bytes.
template <typename T>
__device__ inline Vector<T> load_vector(const T* from) {
  return bits_as<Vector<T>>(load_words(from));
}

template <typename T>
__device__ inline void store_vector(T* to, Vector<T> vector) {
  store_words(to, bits_as<Words>(vector));
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// The smallest i with ends[i] > at; ends[0..n-1] is ascending.
__device__ inline int find(const int64_t* ends, int n, int64_t at) {
  int low = 0, high = n - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] > at) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace taskgroup
