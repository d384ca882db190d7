// A call like the one before it: whether it is, and the same made again over its tensors. On every call's way, so each
// is one crossing from Python.
#pragma once
#include <utility>
#include <vector>

#include "binding.hpp"
#include "places.hpp"
#include "python.hpp"

namespace metafast {

// An object of one of the other classes, which it keeps alive.
template <class T>
struct Held {
  explicit Held(py::object given)
      : owner(std::move(given)), own(owner.is_none() ? nullptr : owner.cast<const T*>()) {}
  const T* operator->() const { return own; }
  explicit operator bool() const { return own != nullptr; }

  py::object owner;
  const T* own;
};

// Finds the tensors of a call, where all that holds of the last one holds of it.
class Repeat {
 public:
  // As in metafast/_C.pyi.
  Repeat(const py::list& places, const py::list& options, Held<Slots> parameters, Held<Slots> buffers,
         Held<Places> numbers, py::tuple hyper, py::object find_hyper, py::ssize_t like,
         const py::list& externs, Held<Facts> facts, Held<Facts> buffer_facts,
         std::pair<py::ssize_t, py::ssize_t> batches);
  py::object read(const py::dict& options, const py::handle& support, const py::handle& query) const;
  int traverse(visitproc visit, void* argument) const;

 private:
  bool read_hyper(PyObject* list, py::ssize_t at) const;
  bool read_batches(PyObject* list, const py::handle& support, const py::handle& query) const;
  bool read_others(PyObject* list) const;

  std::vector<Held<Places>> places_;
  std::vector<std::pair<py::object, py::object>> options_;  // name, value
  Held<Slots> parameters_, buffers_;
  Held<Places> numbers_;  // null: the hyper-parameters are no numbers
  py::tuple hyper_;
  py::object find_hyper_;
  py::ssize_t like_;
  std::vector<py::object> externs_;
  Held<Facts> facts_, buffer_facts_;
  py::ssize_t support_, query_;  // how many tensors
};

// A call whose every tensor is read where it lies, and of which nothing is wanted but the sum of its losses and its
// gradients.
class Ready {
 public:
  // As in metafast/_C.pyi.
  Ready(Held<Binding> binding, const py::list& picks, py::object weights, int64_t divisor, int threads,
        Held<Places> places);
  py::object run(const py::list& tensors) const;
  int traverse(visitproc visit, void* argument) const;

 private:
  struct Pick {
    py::ssize_t at;     // among the tensors of a call; -1: always the same one
    py::object tensor;  // that
  };

  Held<Binding> binding_;
  std::vector<Pick> picks_;
  py::object weights_;
  int64_t divisor_;
  int threads_;
  Held<Places> places_;
};

}  // namespace metafast
