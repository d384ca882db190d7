#include "tensors.hpp"

namespace metafast {
namespace {

// DLPackExchangeAPI of DLPack 1.x, as far as it is used.
struct Exchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *owning_from_object, *owning_to_object;
  int (*view_from_object)(void* object, View* made);
};

// What torch offers, found once.
struct Torch {
  PyObject *tensor = nullptr, *parameter = nullptr;                               // classes
  const Exchange* exchange = nullptr;                                             // null: no views
  PyObject *requires_grad = nullptr, *is_inference = nullptr, *is_neg = nullptr;  // of the class, unbound

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const py::object base = torch.attr("Tensor");
    tensor = py::object(base).release().ptr();
    parameter = torch.attr("nn").attr("Parameter").cast<py::object>().release().ptr();
    requires_grad = found("requires_grad");
    is_inference = found("is_inference");
    is_neg = found("is_neg");
    const py::object table = py::getattr(base, "__dlpack_c_exchange_api__", py::none());
    if (table.is_none() || Py_TYPE(requires_grad)->tp_descr_get == nullptr) return;
    const auto* api = static_cast<const Exchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    if (api->major == 1 && api->view_from_object != nullptr) exchange = api;
  }

  PyObject* found(const char* name) const {
    return py::object(py::handle(tensor).attr(name)).release().ptr();
  }
};

const Torch& torch() {
  static const Torch* const found = new Torch;  // lives as long as the process
  return *found;
}

bool is_true(PyObject* made) { return checked(made).ptr() == Py_True; }

}  // namespace

bool View::contiguous() const {
  for (int d = 0; d < dims; ++d)
    if (shape[d] == 0) return true;
  int64_t dense = 1;
  for (int d = dims - 1; d >= 0; --d) {
    if (shape[d] != 1 && strides[d] != dense) return false;
    dense *= shape[d];
  }
  return true;
}

bool view(PyObject* tensor, View* made) {
  const Torch& known = torch();
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (known.exchange == nullptr || (type != known.tensor && type != known.parameter)) return false;
  if (known.exchange->view_from_object(tensor, made) == 0) return true;
  PyErr_Clear();
  return false;
}

bool requires_grad(PyObject* tensor) {
  PyObject* const getter = torch().requires_grad;
  return is_true(Py_TYPE(getter)->tp_descr_get(getter, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor))));
}

bool made_in_inference_mode(PyObject* tensor) {
  return is_true(PyObject_CallOneArg(torch().is_inference, tensor));
}

bool negated(PyObject* tensor) { return is_true(PyObject_CallOneArg(torch().is_neg, tensor)); }

}  // namespace metafast
