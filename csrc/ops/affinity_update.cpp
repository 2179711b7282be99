#include "ops/affinity_update.h"

#include <torch/csrc/stable/library.h>

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

int64_t check_affinity_update(const Tensor& matrix, const Tensor& before, const Tensor& after,
                              const Tensor& mask, double decay) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == matrix.size(1),
                  "matrix must have shape [K, K].");
  STD_TORCH_CHECK(matrix.scalar_type() == ScalarType::Float, "matrix must be float32.");
  STD_TORCH_CHECK(matrix.is_contiguous(), "matrix must be contiguous.");
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
  return matrix.size(0);
}

}  // namespace taskgroup

STABLE_TORCH_LIBRARY_FRAGMENT(taskgroup, library) {
  library.def(
      "affinity_update_(Tensor(a!) matrix, Tensor before, Tensor after, Tensor mask, float decay)"
      " -> ()");
}
