#include "ops/cuda/launch.h"

#include <dlfcn.h>

namespace taskgroup {

namespace {

using CurrentStream = int32_t (*)(int32_t device, void** stream);

// The function is looked up at run time, because this library also runs on a torch without CUDA,
// which does not export it. Python may load torch's libraries without making their symbols global;
// libtorch_cuda is then opened by its name.
CurrentStream find_current_stream() {
  const char* name = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, name);
  if (found == nullptr) {
    if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
      found = dlsym(library, name);
    }
  }
  return reinterpret_cast<CurrentStream>(found);
}

cudaStream_t current_stream(int32_t device) {
  static const CurrentStream get = find_current_stream();
  STD_TORCH_CHECK(get != nullptr, "this torch was built without CUDA: install a torch with CUDA.");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "torch did not return the current CUDA stream.");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

Launch::Launch(const torch::stable::Tensor& tensor)
    : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {
  // Set the device of the CUDA runtime in this library too, which is not the runtime of torch.
  cudaSetDevice(tensor.get_device_index());
}

void Launch::check(const char* op) const {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice,
                  "taskgroup's CUDA kernels were not built for this GPU: build them with "
                  "CUDAARCHS set to its architecture, or choose another backend.");
  STD_TORCH_CHECK(error == cudaSuccess, "the CUDA kernel of ", op,
                  " was not launched: ", cudaGetErrorString(error), ".");
}

}  // namespace taskgroup
