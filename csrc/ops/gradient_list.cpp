#include "ops/gradient_list.h"

#include <algorithm>
#include <utility>

namespace taskgroup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Whether the elements are adjacent in memory, in any order of the dimensions.
bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  std::vector<std::pair<int64_t, int64_t>> by_stride;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] != 1) by_stride.emplace_back(strides[d], sizes[d]);
  }
  std::sort(by_stride.begin(), by_stride.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : by_stride) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace

bool same_strides(const int64_t* sizes, const int64_t* a, const int64_t* b, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] != 1 && a[d] != b[d]) return false;
  }
  return true;
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, "gradients must be float32, float64, bfloat16 or float16.");
  }
}

ScalarType gram_dtype(const Gradients& gradients) {
  for (const Parameter& parameter : gradients.parameters) {
    if (parameter.dtype == Dtype::kDouble) return ScalarType::Double;
  }
  return ScalarType::Float;
}

Gradients read_gradients(const std::vector<Tensor>& gradients, const std::vector<int64_t>& slots,
                         int64_t n_tasks) {
  const auto n = static_cast<int64_t>(gradients.size());
  STD_TORCH_CHECK(n_tasks >= 1 && n_tasks <= 1024, "tasks must be 1 to 1024, got ", n_tasks, ".");
  STD_TORCH_CHECK(slots.empty() || static_cast<int64_t>(slots.size()) == n,
                  "slots must hold one entry per gradient.");

  Gradients result;
  result.n_tasks = n_tasks;
  result.all.reserve(n);
  std::vector<int64_t> offsets;  // of each gradient's sizes, then strides, in result.shapes
  offsets.reserve(n);
  int64_t last_slot = -1;
  int64_t last_parameter = -1;
  for (int64_t i = 0; i < n; ++i) {
    const Tensor& gradient = gradients[i];
    const int64_t slot = slots.empty() ? i : slots[i];
    STD_TORCH_CHECK(slot > last_slot, "slots must ascend.");
    last_slot = slot;
    const Dtype dtype = dtype_of(gradient);
    const auto dim = static_cast<int32_t>(gradient.dim());
    const auto sizes = gradient.sizes();
    STD_TORCH_CHECK(gradient.device() == gradients[0].device(),
                    "gradients must be on one device: entry ", i, " is not.");
    if (slot / n_tasks != last_parameter) {
      last_parameter = slot / n_tasks;
      const auto at = static_cast<int64_t>(result.all.size());
      result.parameters.push_back({gradient.numel(), dtype, false, dim, nullptr, at, at});
    } else {
      const auto first = gradients[result.parameters.back().begin].sizes();
      STD_TORCH_CHECK(
          dtype == result.parameters.back().dtype && dim == result.parameters.back().dim &&
              std::equal(sizes.begin(), sizes.end(), first.begin()),
          "gradients must have one shape and dtype per parameter: entry ", i, " differs.");
    }
    offsets.push_back(static_cast<int64_t>(result.shapes.size()));
    result.shapes.insert(result.shapes.end(), sizes.begin(), sizes.end());
    const auto strides = gradient.strides();
    result.shapes.insert(result.shapes.end(), strides.begin(), strides.end());
    result.all.push_back(
        {gradient.const_data_ptr(), static_cast<int32_t>(slot % n_tasks), nullptr});
    ++result.parameters.back().end;
  }

  // The vector of shapes does not grow any more, so pointers into it are safe from here on.
  for (Parameter& parameter : result.parameters) {
    const int64_t* sizes = result.shapes.data() + offsets[parameter.begin];
    const int64_t* common = sizes + parameter.dim;
    parameter.sizes = sizes;
    for (int64_t i = parameter.begin; i < parameter.end; ++i) {
      const int64_t* strides = result.shapes.data() + offsets[i] + parameter.dim;
      result.all[i].strides = strides;
      parameter.strided |= !same_strides(sizes, common, strides, parameter.dim);
    }
    parameter.strided |= !is_dense(sizes, common, parameter.dim);
  }
  return result;
}

}  // namespace taskgroup
