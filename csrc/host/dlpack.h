#pragma once

// The part of the DLPack standard (dmlc/dlpack, version 1) that is needed to read a tensor of
// another library. The layout of these C structures does not change within a major version.

#include <cstdint>

namespace taskgroup {

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2 };
enum DLTypeCode : uint8_t { kDLInt = 0, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

struct DLDevice {
  int32_t type, index;
};

struct DLType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLType dtype;
  int64_t* shape;    // [ndim]
  int64_t* strides;  // [ndim], in elements
  uint64_t byte_offset;
};

struct DLExchangeApi {
  uint32_t major, minor;
  DLExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  // Describes a tensor without taking over its memory, and without waiting for a stream. Returns 0
  // on success; otherwise a Python exception is set.
  int (*tensor_from_object)(void* object, DLTensor* tensor);
  void* current_stream;
};

}  // namespace taskgroup
