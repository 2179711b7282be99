#include "host/tensor_reader.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "ops/cpu/affinity_update.h"

namespace py = pybind11;

namespace taskgroup {

namespace {

constexpr Py_ssize_t kMostTasks = 1024;

// A copy of the items of a list or tuple, so that later changes of the list have no effect.
class Items {
 public:
  explicit Items(PyObject* sequence) {
    if (PyList_CheckExact(sequence) || PyTuple_CheckExact(sequence)) {
      items_ = py::reinterpret_steal<py::object>(PySequence_Tuple(sequence));
      if (!items_) throw py::error_already_set();
    }
  }

  explicit operator bool() const { return static_cast<bool>(items_); }
  Py_ssize_t size() const { return items_ ? PyTuple_GET_SIZE(items_.ptr()) : 0; }
  PyObject* operator[](Py_ssize_t i) const { return PyTuple_GET_ITEM(items_.ptr(), i); }

 private:
  py::object items_;
};

bool same(const DLDevice& a, const DLDevice& b) { return a.type == b.type && a.index == b.index; }
bool same(const DLType& a, const DLType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

bool find_dtype(const DLType& type, Dtype& dtype) {
  if (type.lanes != 1) return false;
  if (type.code == kDLBfloat && type.bits == 16) {
    dtype = Dtype::kBFloat16;
  } else if (type.code == kDLFloat && type.bits == 16) {
    dtype = Dtype::kHalf;
  } else if (type.code == kDLFloat && type.bits == 32) {
    dtype = Dtype::kFloat;
  } else if (type.code == kDLFloat && type.bits == 64) {
    dtype = Dtype::kDouble;
  } else {
    return false;
  }
  return true;
}

template <typename scalar_t>
constexpr Dtype dtype_of() {
  return std::is_same_v<scalar_t, double> ? Dtype::kDouble : Dtype::kFloat;
}

int64_t count_elements(const DLTensor& tensor) {
  int64_t numel = 1;
  for (int32_t d = 0; d < tensor.ndim; ++d) numel *= tensor.shape[d];
  return numel;
}

// Whether the elements are adjacent in memory, in any order of the dimensions.
bool is_dense(const DLTensor& tensor) {
  int64_t expected = 1;
  int32_t d = tensor.ndim - 1;
  for (; d >= 0; --d) {  // try the usual order first
    if (tensor.shape[d] == 1) continue;
    if (tensor.strides[d] != expected) break;
    expected *= tensor.shape[d];
  }
  if (d < 0) return true;
  std::vector<std::pair<int64_t, int64_t>> by_stride;
  for (d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] != 1) by_stride.emplace_back(tensor.strides[d], tensor.shape[d]);
  }
  std::sort(by_stride.begin(), by_stride.end());
  expected = 1;
  for (const auto& [stride, size] : by_stride) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether the elements are adjacent in memory, in the usual order of the dimensions.
bool is_contiguous(const DLTensor& tensor) {
  int64_t expected = 1;
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

// Whether two tensors have the same shape and the same order of elements in memory.
bool same_layout(const DLTensor& a, const DLTensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int32_t d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d]) return false;
    if (a.shape[d] != 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

}  // namespace

py::list ReadGradients::first() const {
  py::list result(first_.size());
  for (size_t t = 0; t < first_.size(); ++t) result[t] = first_[t];
  return result;
}

std::vector<int64_t> ReadGradients::keep_measured() {
  Gradients& gradients = plain_.gradients;
  std::vector<int32_t> place(gradients.n_tasks, -1);
  for (const Gradient& gradient : gradients.all) place[gradient.task] = 0;
  std::vector<int64_t> tasks;
  for (int64_t k = 0; k < gradients.n_tasks; ++k) {
    if (place[k] < 0) continue;
    place[k] = static_cast<int32_t>(tasks.size());
    tasks.push_back(k);
  }
  for (Gradient& gradient : gradients.all) gradient.task = place[gradient.task];
  gradients.n_tasks = static_cast<int64_t>(tasks.size());
  return tasks;
}

TensorReader::TensorReader(const py::tuple& types) {
  for (const py::handle& type : types) types_.push_back(type.ptr());
  is_neg_ = py::object(types[0].attr("is_neg")).release().ptr();
  const auto capsule = types[0].attr("__dlpack_c_exchange_api__").cast<py::capsule>();
  const auto* api = capsule.get_pointer<DLExchangeApi>();
  while (api != nullptr && api->major != 1) api = api->previous;
  if (api == nullptr || api->tensor_from_object == nullptr) {
    throw std::runtime_error("this torch does not offer tensor_from_object of DLPack 1.");
  }
  api_ = api;
}

bool TensorReader::read_tensor(PyObject* object, DLTensor& tensor) const {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (std::find(types_.begin(), types_.end(), type) == types_.end()) return false;
  if (api_->tensor_from_object(object, &tensor) != 0) {
    PyErr_Clear();  // a sparse tensor, or one on a device without memory
    return false;
  }
  const int64_t numel = count_elements(tensor);
  if (numel > 0 && tensor.data == nullptr) return false;
  tensor.data = static_cast<unsigned char*>(tensor.data) + tensor.byte_offset;
  const bool behind_another =
      reinterpret_cast<uintptr_t>(tensor.data) % (tensor.dtype.bits / 4) != 0;
  if (numel == 1 && behind_another) {
    // torch marks the imaginary part of a conjugate as negated, and DLPack does not report that. An
    // imaginary part lies behind a real part; most scalars have memory of their own.
    const auto marked = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg_, object));
    if (!marked) throw py::error_already_set();
    if (marked.ptr() != Py_False) return false;
  }
  return true;
}

std::unique_ptr<ReadGradients> TensorReader::read(const py::object& gradients) const {
  const Items tasks(gradients.ptr());
  const auto K = tasks.size();
  if (!tasks || K < 1 || K > kMostTasks) return nullptr;
  std::vector<Items> own;
  for (Py_ssize_t k = 0; k < K; ++k) {
    own.emplace_back(tasks[k]);
    if (!own[k] || own[k].size() != own[0].size()) return nullptr;
  }
  const Py_ssize_t T = own[0].size();
  auto result = std::make_unique<ReadGradients>(*this);
  Gradients& read = result->plain_.gradients;
  read.n_tasks = K;
  read.all.reserve(K * T);
  read.parameters.reserve(T);
  result->tensors_.reserve(K * T);
  result->first_.reserve(T);
  for (Py_ssize_t t = 0; t < T; ++t) {
    DLTensor first = {};
    PyObject* first_object = Py_None;
    for (Py_ssize_t k = 0; k < K; ++k) {
      PyObject* object = own[k][t];
      if (object == Py_None) continue;
      DLTensor tensor;
      if (!read_tensor(object, tensor)) return nullptr;
      if (first_object == Py_None) {
        Dtype dtype;
        if (!find_dtype(tensor.dtype, dtype) || !is_dense(tensor)) return nullptr;
        if (read.all.empty()) {
          result->device_ = tensor.device;
        }
        const auto begin = static_cast<int64_t>(read.all.size());
        read.parameters.push_back(
            {count_elements(tensor), dtype, false, tensor.ndim, tensor.shape, begin, begin});
        result->types_.push_back(tensor.dtype);
        first = tensor;
        first_object = object;
      } else if (!same(tensor.dtype, first.dtype) || !same_layout(tensor, first)) {
        return nullptr;
      }
      if (!same(tensor.device, result->device_)) return nullptr;
      read.all.push_back({tensor.data, static_cast<int32_t>(k), tensor.strides});
      result->tensors_.push_back(py::reinterpret_borrow<py::object>(object));
      ++read.parameters.back().end;
    }
    result->first_.push_back(py::reinterpret_borrow<py::object>(first_object));
  }
  if (read.all.empty()) return nullptr;
  return result;
}

template <typename scalar_t>
bool TensorReader::copy_scalars(PyObject* scalars, PyObject* names, scalar_t* copy) const {
  const Py_ssize_t n = PyTuple_GET_SIZE(names);
  Py_ssize_t position = 0, k = 0;
  PyObject *name, *value;
  for (; k < n && PyDict_Next(scalars, &position, &name, &value); ++k) {
    PyObject* const expected = PyTuple_GET_ITEM(names, k);
    if (name != expected &&
        (!PyUnicode_CheckExact(name) || PyUnicode_Compare(name, expected) != 0)) {
      return false;
    }
    const auto scalar = py::reinterpret_borrow<py::object>(value);  // a mode may change the dict
    DLTensor tensor;
    Dtype dtype;
    if (!read_tensor(value, tensor) || tensor.ndim != 0 || tensor.device.type != kDLCPU ||
        !find_dtype(tensor.dtype, dtype) || dtype != dtype_of<scalar_t>()) {
      return false;
    }
    copy[k] = *static_cast<const scalar_t*>(tensor.data);
  }
  return k == n;
}

py::object TensorReader::read_scalars(const py::dict& scalars, const py::tuple& names) const {
  const auto n = static_cast<py::ssize_t>(names.size());
  PyObject *name, *first;
  Py_ssize_t position = 0;
  DLTensor tensor;
  Dtype dtype;
  if (PyDict_GET_SIZE(scalars.ptr()) != n ||
      !PyDict_Next(scalars.ptr(), &position, &name, &first) || !read_tensor(first, tensor) ||
      !find_dtype(tensor.dtype, dtype)) {
    return py::none();
  }
  const auto copied = [&](auto array) -> py::object {
    if (copy_scalars(scalars.ptr(), names.ptr(), array.mutable_data())) return array;
    return py::none();
  };
  if (dtype == Dtype::kFloat) return copied(py::array_t<float>(n));
  if (dtype == Dtype::kDouble) return copied(py::array_t<double>(n));
  return py::none();
}

bool TensorReader::update_affinity(const py::handle& matrix, const py::handle& before,
                                   const py::handle& after, const py::handle& mask, double decay,
                                   const py::handle& observed) const {
  DLTensor m, b, a, s, o;
  if (!read_tensor(matrix.ptr(), m) || !read_tensor(before.ptr(), b) ||
      !read_tensor(after.ptr(), a) || !read_tensor(mask.ptr(), s) ||
      !read_tensor(observed.ptr(), o)) {
    return false;
  }
  const int64_t K = m.ndim == 2 ? m.shape[0] : -1;
  for (const DLTensor* square : {&m, &o}) {
    if (square->ndim != 2 || square->shape[0] != K || square->shape[1] != K) return false;
  }
  for (const DLTensor* vector : {&b, &a, &s}) {
    if (vector->ndim != 1 || vector->shape[0] != K) return false;
  }
  for (const DLTensor* tensor : {&m, &b, &a, &s, &o}) {
    if (tensor->device.type != kDLCPU || !is_contiguous(*tensor)) return false;
  }
  constexpr DLType kFloat = {kDLFloat, 32, 1}, kDouble = {kDLFloat, 64, 1};
  if (!same(m.dtype, kFloat) || !same(o.dtype, {kDLInt, 32, 1}) ||
      !same(s.dtype, {kDLBool, 8, 1}) || !same(a.dtype, b.dtype)) {
    return false;
  }
  const auto run = [&](auto zero) {
    using scalar_t = const decltype(zero);
    const py::gil_scoped_release release;
    taskgroup::update_affinity(static_cast<float*>(m.data), static_cast<scalar_t*>(b.data),
                               static_cast<scalar_t*>(a.data), static_cast<const bool*>(s.data), K,
                               decay, static_cast<int32_t*>(o.data));
    return true;
  };
  if (same(b.dtype, kFloat)) return run(float{});
  if (same(b.dtype, kDouble)) return run(double{});
  return false;
}

bool ReadGradients::read_outputs(const py::object& outputs) {
  const Items items(outputs.ptr());
  if (!items || items.size() != static_cast<Py_ssize_t>(first_.size())) return false;
  plain_.outputs.clear();
  for (Py_ssize_t t = 0; t < items.size(); ++t) {
    if (first_[t].is_none()) continue;
    const DLType& type = types_[plain_.outputs.size()];
    DLTensor gradient, output;
    if (!reader_.read_tensor(first_[t].ptr(), gradient) || !reader_.read_tensor(items[t], output) ||
        !same(output.dtype, type) || !same(output.device, device_) ||
        !same_layout(output, gradient)) {
      return false;
    }
    plain_.outputs.push_back(output.data);
  }
  return true;
}

}  // namespace taskgroup
