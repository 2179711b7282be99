#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "host/affinity_propagation.h"
#include "host/gradient_reader.h"
#include "host/normalised_affinity.h"
#include "instruction_set.h"

namespace py = pybind11;

namespace {

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

std::optional<py::array_t<int64_t>> affinity_propagation(const Array& similarity,
                                                         const std::optional<Array>& preference,
                                                         const Array& noise, double damping,
                                                         int64_t max_iter,
                                                         int64_t convergence_iter) {
  const py::ssize_t K = similarity.ndim() == 2 ? similarity.shape(0) : 0;
  if (K == 0 || similarity.shape(1) != K) {
    throw std::invalid_argument("similarity must have shape [K, K] with K >= 1.");
  }
  if (preference && (preference->ndim() != 1 || preference->shape(0) != K)) {
    throw std::invalid_argument("preference must have shape [K].");
  }
  if (noise.ndim() != 2 || noise.shape(0) != K || noise.shape(1) != K) {
    throw std::invalid_argument("noise must have shape [K, K].");
  }
  const double* s = similarity.data();
  if (!std::all_of(s, s + K * K, [](double x) { return std::isfinite(x); })) {
    throw std::invalid_argument("similarity must be finite.");
  }
  const double* p = preference ? preference->data() : nullptr;
  std::optional<std::vector<int64_t>> labels;
  {
    const py::gil_scoped_release release;
    labels =
        taskgroup::affinity_propagation(s, p, noise.data(), K, damping, max_iter, convergence_iter);
  }
  if (!labels) return std::nullopt;
  return py::array_t<int64_t>(static_cast<py::ssize_t>(labels->size()), labels->data());
}

template <typename scalar_t>
py::tuple normalised_affinity(const py::array_t<scalar_t, py::array::c_style>& affinity) {
  const py::ssize_t K = affinity.ndim() == 2 ? affinity.shape(0) : 0;
  if (K == 0 || affinity.shape(1) != K) {
    throw std::invalid_argument("affinity must have shape [K, K] with K >= 1.");
  }
  const taskgroup::NormalisedAffinity found = taskgroup::normalise(affinity.data(), K);
  const auto n = static_cast<py::ssize_t>(found.known.size());
  return py::make_tuple(py::array_t<int64_t>(n, found.known.data()),
                        py::array_t<double>({n, n}, found.similarity.data()));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Decisions that taskgroup makes on the host, in C++.";
  m.def("cpu_instruction_set", [] { return taskgroup::name_of(taskgroup::instruction_set()); });
  m.def("affinity_propagation", &affinity_propagation, py::arg("similarity"), py::arg("preference"),
        py::arg("noise"), py::arg("damping"), py::arg("max_iter"), py::arg("convergence_iter"));
  m.def("normalised_affinity", &normalised_affinity<float>, py::arg("affinity").noconvert());
  m.def("normalised_affinity", &normalised_affinity<double>, py::arg("affinity"));
  py::class_<taskgroup::ReadGradients>(m, "ReadGradients")
      .def_property_readonly("address", &taskgroup::ReadGradients::address)
      .def_property_readonly("like", &taskgroup::ReadGradients::like)
      .def_property_readonly("first", &taskgroup::ReadGradients::first)
      .def("keep_measured", &taskgroup::ReadGradients::keep_measured)
      .def("read_outputs", &taskgroup::ReadGradients::read_outputs, py::arg("outputs"));
  py::class_<taskgroup::GradientReader>(m, "GradientReader")
      .def(py::init<const py::tuple&>(), py::arg("types"))
      .def("read", &taskgroup::GradientReader::read, py::arg("gradients"), py::keep_alive<0, 1>())
      .def("read_scalars", &taskgroup::GradientReader::read_scalars, py::arg("scalars"),
           py::arg("names"));
}
