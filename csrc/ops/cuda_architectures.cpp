#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

namespace taskgroup {
namespace {

// The architectures that the CUDA kernels were compiled for (80, 90, ...); empty without kernels.
std::vector<int64_t> cuda_architectures() { return {TASKGROUP_CUDA_ARCHITECTURES}; }

}  // namespace
}  // namespace taskgroup

STABLE_TORCH_LIBRARY_FRAGMENT(taskgroup, library) { library.def("cuda_architectures() -> int[]"); }

STABLE_TORCH_LIBRARY_IMPL(taskgroup, CompositeExplicitAutograd, library) {
  library.impl("cuda_architectures", TORCH_BOX(&taskgroup::cuda_architectures));
}
