// Whether what Python code can read is what it was: looked at before every call, so in C++.
#pragma once
#include <vector>

#include "python.hpp"

namespace metafast {

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
  enum Kind { kItem, kAttribute, kType, kCell, kEmptyCell };
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

  std::vector<Place> places_;
  std::vector<Size> sizes_;
  bool known_ = true;  // false once cleared
};

// What a plan depends on in tensors, their values aside: class, shape, dtype, device, layout, requires_grad, nested.
class Facts {
 public:
  explicit Facts(const py::list& tensors);
  // Whether these have the same, and none was made in inference mode.
  bool hold(const py::list& tensors) const;

 private:
  static constexpr int kSingle = 4, kEqual = 2;  // attributes compared by identity, by value
  struct Tensor {
    py::object type;
    py::object single[kSingle], equal[kEqual];
  };

  static PyObject* const* single_names();
  static PyObject* const* equal_names();
  static bool same(const Tensor& known, PyObject* tensor);

  std::vector<Tensor> tensors_;
};

}  // namespace metafast
