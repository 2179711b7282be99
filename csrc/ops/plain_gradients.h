#pragma once

#include <cstdint>
#include <vector>

#include "ops/gradients.h"

namespace taskgroup {

// Gradients that the host library has read from plain tensors, none of them strided; an op gets its
// address, as a number. A list of tensors takes longer to reach an op than most ops take.
struct PlainGradients {
  Gradients gradients;
  std::vector<void*> outputs;  // of combine, one for each parameter
};

inline const PlainGradients& plain_gradients(int64_t address) {
  return *reinterpret_cast<const PlainGradients*>(address);
}

}  // namespace taskgroup
