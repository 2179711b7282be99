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

  // The first gradient of each parameter, or None.
  pybind11::list first() const;

  // Numbers the gradients by the tasks that have one alone; returns these tasks, ascending.
  std::vector<int64_t> keep_measured();

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
