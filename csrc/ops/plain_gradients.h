#pragma once

#include <cstdint>
#include <vector>

#include "ops/gradients.h"

namespace taskgroup {

// Gradients that the host library has read from plain tensors; none of them is strided. An op gets
// the address of this object as a number, because passing a list of tensors to an op takes longer
// than most ops.
struct PlainGradients {
  Gradients gradients;
  std::vector<void*> outputs;  // the outputs of combine, one for each parameter
};

inline const PlainGradients& plain_gradients(int64_t address) {
  return *reinterpret_cast<const PlainGradients*>(address);
}

}  // namespace taskgroup
