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
  explicit ReadGradients(const class GradientReader& reader) : reader_(reader) {}

  int64_t address() const { return reinterpret_cast<int64_t>(&plain_); }

  // One of the gradients.
  pybind11::object like() const { return tensors_.front(); }

  // The first gradient of each parameter, or None.
  pybind11::list first() const;

  // Leaves out the tasks without any gradient, and returns the other tasks, ascending.
  std::vector<int64_t> keep_measured();

  // Reads the tensors [T] that `combine` writes to. False if a tensor is not plain or does not fit.
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

// Reads [K][T] tensors or None, in a tenth of the time that it takes to pass them to an op.
class GradientReader {
 public:
  // types: the plain tensor types. The first one defines how a tensor is read.
  explicit GradientReader(const pybind11::tuple& types);

  // Null unless every tensor is of one of the types, dense and in memory, and agrees with the
  // others on its parameter in shape, layout, dtype and device. A tensor of one element is also
  // checked for torch's mark that its number is to be negated. Larger ones are not, which takes too
  // long: they have gaps, unless as_strided() or torch's private _neg_view() made them.
  std::unique_ptr<ReadGradients> read(const pybind11::object& gradients) const;

 private:
  friend class ReadGradients;
  bool read_tensor(PyObject* object, DLTensor& tensor) const;

  // Classes of torch and a method of theirs: they are never freed.
  std::vector<PyObject*> types_;
  PyObject* is_neg_;
  const DLExchangeApi* api_;
};

}  // namespace taskgroup
