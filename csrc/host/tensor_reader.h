#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "host/dlpack.h"
#include "ops/plain_gradients.h"

namespace taskgroup {

// The gradients that a reader found, and the tensors that own their memory.
class ReadGradients {
 public:
  explicit ReadGradients(const class TensorReader& reader) : reader_(reader) {}

  int64_t address() const { return reinterpret_cast<int64_t>(&plain_); }

  // One of the gradients.
  pybind11::object like() const { return tensors_.front(); }

  // The first gradient of each parameter, or None.
  pybind11::list first() const;

  // Removes the tasks without any gradient. Returns the remaining tasks in ascending order.
  std::vector<int64_t> keep_measured();

  // Reads the tensors [T] that `combine` writes to. Returns false if a tensor is not plain or does
  // not match the gradients.
  bool read_outputs(const pybind11::object& outputs);

 private:
  friend class TensorReader;
  const TensorReader& reader_;
  PlainGradients plain_;
  DLDevice device_ = {};
  std::vector<DLType> types_;              // of the parameters
  std::vector<pybind11::object> tensors_;  // in the order of plain_.gradients.all
  std::vector<pybind11::object> first_;    // [T]
};

// Reads plain tensors. This takes a tenth of the time that passing the tensors to an op takes.
class TensorReader {
 public:
  // types: the plain tensor types. The first one defines how a tensor is read.
  explicit TensorReader(const pybind11::tuple& types);

  // Reads a nested list [K][T] of tensors or None. Returns null unless every tensor has one of the
  // types, is dense, and has the same shape, layout, dtype and device as the others on its
  // parameter. The reader also rejects a tensor of one element that torch has marked as negated.
  // Larger tensors are not checked, because that takes too long. A negated one has gaps and is
  // rejected for that reason, unless it was made by as_strided() or by torch's private _neg_view().
  std::unique_ptr<ReadGradients> read(const pybind11::object& gradients) const;

  // Copies scalars on the CPU into one array, float32 or float64. Returns None unless all have the
  // same of these dtypes and are plain, as above, and the keys are `names`, in the same order.
  pybind11::object read_scalars(const pybind11::dict& scalars, const pybind11::tuple& names) const;

  // Updates an affinity matrix as the op affinity_update_ does, with checked arguments. Returns
  // false, and changes nothing, unless all tensors are contiguous, on the CPU and plain, as above.
  bool update_affinity(const pybind11::handle& matrix, const pybind11::handle& before,
                       const pybind11::handle& after, const pybind11::handle& mask, double decay,
                       const pybind11::handle& observed) const;

 private:
  friend class ReadGradients;
  bool read_tensor(PyObject* object, DLTensor& tensor) const;

  template <typename scalar_t>
  bool copy_scalars(PyObject* scalars, PyObject* names, scalar_t* copy) const;

  // Classes of torch and one of their methods, which are never freed.
  std::vector<PyObject*> types_;
  PyObject* is_neg_;
  const DLExchangeApi* api_;
};

}  // namespace taskgroup
