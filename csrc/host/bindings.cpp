#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "host/affinity_propagation.h"
#include "host/boundary_matching.h"
#include "host/normalised_affinity.h"
#include "host/tensor_reader.h"
#include "host/thinning.h"
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
                        py::array_t<double>({n, n}, found.similarity.data()), found.complete);
}

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Mask = py::array_t<bool, py::array::c_style>;

// Throws an exception unless an array has the shape [H, W] of another one, of at most 2^31 pixels.
void check_map(const char* name, const py::array& array, const py::array& like) {
  if (array.ndim() != 2 || like.ndim() != 2 || array.shape(0) != like.shape(0) ||
      array.shape(1) != like.shape(1) || array.size() > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::string(name) + " must have the shape [H, W] of the others.");
  }
}

const uint8_t* bytes_of(const Mask& mask) { return reinterpret_cast<const uint8_t*>(mask.data()); }

Mask thin(const Mask& image) {
  check_map("image", image, image);
  const int64_t H = image.shape(0), W = image.shape(1);
  Mask result({H, W});
  const uint8_t* from = bytes_of(image);
  bool* to = result.mutable_data();
  {
    const py::gil_scoped_release release;
    taskgroup::Bitmap bitmap(H, W);
    bitmap.assign([&](int64_t pixel) { return from[pixel] != 0; });
    taskgroup::thin(bitmap);
    std::fill_n(to, H * W, false);
    bitmap.for_each([&](int64_t pixel) { to[pixel] = true; });
  }
  return result;
}

int64_t match_boundaries(const Mask& one, const Mask& other, double distance) {
  check_map("other", other, one);
  if (!(distance >= 0)) throw std::invalid_argument("distance must be at least 0.");
  const uint8_t *a = bytes_of(one), *b = bytes_of(other);
  const int64_t H = one.shape(0), W = one.shape(1);
  const py::gil_scoped_release release;
  return taskgroup::match_boundaries(a, b, H, W, distance);
}

py::array_t<int64_t> count_boundaries(const Bytes& reached, const Mask& label, const Mask& known,
                                      double distance, int64_t n) {
  check_map("label", label, reached);
  check_map("known", known, reached);
  if (!(distance >= 0)) throw std::invalid_argument("distance must be at least 0.");
  if (n < 1 || n > 255) throw std::invalid_argument("n must be in [1, 255].");
  py::array_t<int64_t> counts({int64_t{3}, n});
  const uint8_t *r = reached.data(), *l = bytes_of(label), *k = bytes_of(known);
  const int64_t H = reached.shape(0), W = reached.shape(1);
  int64_t* result = counts.mutable_data();
  {
    const py::gil_scoped_release release;
    taskgroup::count_boundaries(r, l, k, H, W, distance, n, result);
  }
  return counts;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Decisions that taskgroup makes on the host, in C++.";
  m.def("cpu_instruction_set", [] { return taskgroup::name_of(taskgroup::instruction_set()); });
  m.def("affinity_propagation", &affinity_propagation, py::arg("similarity"), py::arg("preference"),
        py::arg("noise"), py::arg("damping"), py::arg("max_iter"), py::arg("convergence_iter"));
  m.def("normalised_affinity", &normalised_affinity<float>, py::arg("affinity").noconvert());
  m.def("normalised_affinity", &normalised_affinity<double>, py::arg("affinity"));
  m.def("thin", &thin, py::arg("image").noconvert());
  m.def("match_boundaries", &match_boundaries, py::arg("one").noconvert(),
        py::arg("other").noconvert(), py::arg("distance"));
  m.def("count_boundaries", &count_boundaries, py::arg("reached").noconvert(),
        py::arg("label").noconvert(), py::arg("known").noconvert(), py::arg("distance"),
        py::arg("n"));
  py::class_<taskgroup::ReadGradients>(m, "ReadGradients")
      .def_property_readonly("address", &taskgroup::ReadGradients::address)
      .def_property_readonly("like", &taskgroup::ReadGradients::like)
      .def_property_readonly("first", &taskgroup::ReadGradients::first)
      .def("keep_measured", &taskgroup::ReadGradients::keep_measured)
      .def("read_outputs", &taskgroup::ReadGradients::read_outputs, py::arg("outputs"));
  py::class_<taskgroup::TensorReader>(m, "TensorReader")
      .def(py::init<const py::tuple&>(), py::arg("types"))
      .def("read", &taskgroup::TensorReader::read, py::arg("gradients"), py::keep_alive<0, 1>())
      .def("read_scalars", &taskgroup::TensorReader::read_scalars, py::arg("scalars"),
           py::arg("names"))
      .def("update_affinity", &taskgroup::TensorReader::update_affinity, py::arg("matrix"),
           py::arg("before"), py::arg("after"), py::arg("mask"), py::arg("decay"),
           py::arg("observed"));
}
