#include "ops/affinity_update.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>

namespace taskgroup {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void check_vector(const char* name, const Tensor& vector, const Tensor& matrix) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == matrix.size(0), name,
                  " must have shape [K] with K = ", matrix.size(0), ", the rows of matrix.");
  STD_TORCH_CHECK(vector.is_contiguous(), name, " must be contiguous.");
  STD_TORCH_CHECK(vector.device() == matrix.device(), name, " must be on the device of matrix.");
}

}  // namespace

int64_t check_affinity(const Tensor& matrix, const std::optional<Tensor>& observed) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == matrix.size(1),
                  "matrix must have shape [K, K].");
  STD_TORCH_CHECK(matrix.scalar_type() == ScalarType::Float, "matrix must be float32.");
  STD_TORCH_CHECK(matrix.is_contiguous(), "matrix must be contiguous.");
  const int64_t K = matrix.size(0);
  if (!observed.has_value()) return K;
  STD_TORCH_CHECK(observed->dim() == 2 && observed->size(0) == K && observed->size(1) == K,
                  "observed must have shape [K, K] with K = ", K, ", as matrix.");
  STD_TORCH_CHECK(observed->scalar_type() == ScalarType::Int, "observed must be int32.");
  STD_TORCH_CHECK(observed->is_contiguous(), "observed must be contiguous.");
  STD_TORCH_CHECK(observed->device() == matrix.device(),
                  "observed must be on the device of matrix.");
  const auto address = [](const Tensor& tensor) {
    return reinterpret_cast<intptr_t>(tensor.const_data_ptr());
  };
  const int64_t bytes = K * K * static_cast<int64_t>(sizeof(float));
  STD_TORCH_CHECK(std::abs(address(*observed) - address(matrix)) >= bytes,
                  "observed must have memory of its own, not that of matrix.");
  return K;
}

int64_t check_affinity_update(const Tensor& matrix, const Tensor& before, const Tensor& after,
                              const Tensor& mask, double decay,
                              const std::optional<Tensor>& observed) {
  const int64_t K = check_affinity(matrix, observed);
  check_vector("before", before, matrix);
  check_vector("after", after, matrix);
  check_vector("mask", mask, matrix);
  STD_TORCH_CHECK(
      before.scalar_type() == ScalarType::Float || before.scalar_type() == ScalarType::Double,
      "before must be float32 or float64.");
  STD_TORCH_CHECK(after.scalar_type() == before.scalar_type(),
                  "after must have the dtype of before.");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "mask must be bool.");
  STD_TORCH_CHECK(decay > 0.0 && decay <= 1.0, "decay must be in (0, 1], got ", decay, ".");
  return K;
}

}  // namespace taskgroup

STABLE_TORCH_LIBRARY_FRAGMENT(taskgroup, library) {
  library.def(
      "affinity_update_(Tensor(a!) matrix, Tensor before, Tensor after, Tensor mask, float decay, "
      "Tensor(b!)? observed=None) -> ()");
}
