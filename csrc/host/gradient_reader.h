#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "host/dlpack.h"
#include "ops/plain_gradients.h"

namespace taskgroup {

// What a reader found, and the tensors that own the memory it points to.
class ReadGradients {
 public:
  explicit ReadGradients(const class GradientReader& reader) : reader_(reader) {}

  int64_t address() const { return reinterpret_cast<int64_t>(&plain_); }

  // Any of the gradients.
  pybind11::object like() const { return tensors_.front(); }

  // Of each parameter the first gradient, or None.
  pybind11::list first() const;

  // The tasks that have a gradient, ascending; from now on the gradients are those of these alone.
  std::vector<int64_t> measured();

  // Where `combine` writes, [T]. False if a tensor is not plain or does not fit its gradients.
  bool read_outputs(const pybind11::object& outputs);

 private:
  friend class GradientReader;
  const GradientReader& reader_;
  PlainGradients plain_;
  DLDevice device_ = {};
  std::vector<DLType> types_;              // of the parameters
  std::vector<pybind11::object> tensors_;  // in the order of plain_.gradients.all
  std::vector<pybind11::object> first_;    // [T]
};

// Reads [K][T] tensors or None, at a tenth of what it takes to pass a list of tensors to an op.
class GradientReader {
 public:
  // types: those that are nothing but a tensor, the first of which says how it is read.
  explicit GradientReader(const pybind11::tuple& types);

  // None if any of them is more than a plain tensor: of another class, shape, type or device than
  // the others, sparse, with gaps, to be negated when it is read, or without memory.
  std::unique_ptr<ReadGradients> read(const pybind11::object& gradients) const;

 private:
  friend class ReadGradients;
  bool read_tensor(PyObject* object, DLTensor& tensor) const;

  std::vector<PyObject*> types_;  // classes of torch: they are never freed
  const DLExchangeApi* api_;
};

}  // namespace taskgroup
