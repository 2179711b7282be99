#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

namespace taskgroup {

// The device of a tensor and its current stream, for the lifetime of this object.
class Launch {
 public:
  explicit Launch(const torch::stable::Tensor& tensor);

  cudaStream_t stream() const { return stream_; }

  // Raises an error if a kernel that was launched during this lifetime could not start.
  void check(const char* op) const;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace taskgroup
