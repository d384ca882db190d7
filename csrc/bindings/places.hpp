// Whether what Python code can read is what it was: looked at before every call, so in C++.
#pragma once
#include <vector>

#include "python.hpp"
#include "tensors.hpp"

namespace metafast {

// What looking raised is taken for a change, unless it is to end the program.
void forget_error();

// Places that held certain objects, and containers of certain sizes. Keeps all of them alive, as far as the garbage
// collector sees another reason to: what is looked at may well hold who looks.
class Places {
 public:
  // (kind, owner, name, value) each, as in metafast/_C.pyi; (container, length) each.
  Places(const py::list& places, const py::list& sizes);
  bool hold() const;
  // Calls visit(object) for every object that is kept, until it returns other than 0; returns that.
  int traverse(visitproc visit, void* argument) const;
  void clear();

 private:
  enum Kind { kItem, kAttribute, kType, kCell, kEmptyCell, kOrder, kAnswer };
  struct Place {
    Kind kind;
    py::object owner, name, value;
  };
  struct Size {
    py::object container;
    py::ssize_t length;
  };

  static Kind parse_kind(const std::string& name);
  static bool holds(const Place& place);
  static bool in_order(PyObject* dict, PyObject* keys);

  std::vector<Place> places_;
  std::vector<Size> sizes_;
  bool known_ = true;  // false once cleared
};

// Entries of dictionaries that hold tensors, read at every call.
class Slots {
 public:
  // (dict, key) each; of each tie, the number of a slot, and another (dict, key) that is to hold the same.
  Slots(const py::list& slots, const py::list& ties);
  // What they hold, in order. None where one is missing or holds None, where a tie is broken, or a tensor is held twice.
  py::object read() const;
  size_t size() const { return slots_.size(); }
  // The same into `list` from `at` on, which holds nothing there; false for None.
  bool read_into(PyObject* list, py::ssize_t at) const;
  int traverse(visitproc visit, void* argument) const;
  void clear();

 private:
  struct Slot {
    py::object store, key;
  };
  struct Tie {
    size_t slot;
    Slot other;
  };

  static Slot parse_slot(py::object store, py::object key);
  static PyObject* held(const Slot& slot);

  std::vector<Slot> slots_;
  std::vector<Tie> ties_;
};

// What a plan depends on in tensors, their values aside: class, shape, dtype, device, layout, requires_grad, nested.
class Facts {
 public:
  explicit Facts(const py::list& tensors);
  // Whether these have the same, and none was made in inference mode.
  bool hold(const py::list& tensors) const;
  size_t size() const { return tensors_.size(); }
  // Whether `count` of `list` from `at` on have the same as those from `first` on, however they were made.
  bool hold_in(PyObject* list, py::ssize_t at, size_t first, size_t count) const;

 private:
  static constexpr int kSingle = 4, kEqual = 2;  // attributes compared by identity, by value
  struct Tensor {
    py::object type;
    bool viewed = false;  // all of it shows in a view but the first
    bool wants = false;
    View::Device device{};
    View::Type dtype{};
    std::vector<int64_t> shape;
    py::object single[kSingle], equal[kEqual];  // where there is no view
  };

  static PyObject* const* single_names();
  static PyObject* const* equal_names();
  static Tensor known(PyObject* tensor);
  static bool same(const Tensor& known, PyObject* tensor);
  static bool same_view(const Tensor& known, PyObject* tensor);

  std::vector<Tensor> tensors_;
};

}  // namespace metafast
