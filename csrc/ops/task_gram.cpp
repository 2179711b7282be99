#include "ops/task_gram.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(taskgroup, library) {
  library.def("task_gram(Tensor[] gradients, int[] slots, int n_tasks) -> Tensor");
  library.def("_plain_task_gram(int gradients, Tensor like) -> Tensor");
}
