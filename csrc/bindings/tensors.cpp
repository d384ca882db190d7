#include "tensors.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace metafast {
namespace {

// DLPackExchangeAPI of DLPack 1.x, as far as it is used.
struct Exchange {
  uint32_t major, minor;
  void* previous;
  void *allocate, *owning_from_object;
  int (*owning_to_object)(void* managed, void** made);
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
    if (api->major == 1 && api->view_from_object && api->owning_to_object) exchange = api;
  }

  PyObject* found(const char* name) const {
    return py::object(py::handle(tensor).attr(name)).release().ptr();
  }
};

const Torch& torch() {
  static const Torch* const found = new Torch;  // lives as long as the process
  return *found;
}

constexpr int32_t kCpu = 1;           // DLPack's name for it
constexpr uintptr_t kAlignment = 64;  // torch's own

py::tuple to_tuple(const int64_t* values, int32_t count) {
  py::tuple made(count);
  for (int32_t n = 0; n < count; ++n) made[n] = values[n];
  return made;
}

// A tensor like the array, whose memory torch cannot take over.
py::object copied(const View& array, int64_t bytes) {
  const py::module_ torch = py::module_::import("torch");
  py::object made = torch.attr("empty_strided")(
      to_tuple(array.shape, array.dims), to_tuple(array.strides, array.dims),
      py::arg("dtype") = torch.attr(array.type.bits == 32 ? "float32" : "float64"),
      py::arg("device") = "cpu");
  std::memcpy(reinterpret_cast<void*>(made.attr("data_ptr")().cast<uintptr_t>()), array.data, bytes);
  return made;
}

bool is_true(PyObject* made) { return checked(made).ptr() == Py_True; }

// What a method of torch's that takes nothing says of a tensor of any class.
bool says(PyObject* method, PyObject* tensor) {
  static PyTypeObject* const descriptor = &PyMethodDescr_Type;
  if (Py_TYPE(method) == descriptor && PyObject_TypeCheck(tensor, PyDescr_TYPE(method)))
    if (const PyMethodDef* const own = reinterpret_cast<PyMethodDescrObject*>(method)->d_method;
        own->ml_flags == METH_NOARGS)
      return is_true(own->ml_meth(tensor, nullptr));
  return is_true(PyObject_CallOneArg(method, tensor));
}

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

int64_t Shape::bytes() const {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return count * type.bits / 8;
}

// DLManagedTensorVersioned of DLPack 1.x. Sizes and strides come behind it, then the elements.
struct Block::Managed {
  uint32_t major, minor;
  int64_t bytes;  // of the elements; DLPack leaves this word to whoever made it
  void (*free)(Managed* self);
  uint64_t flags;
  View array;
};

void Block::Free::operator()(Managed* managed) const noexcept { std::free(managed); }

Block::Block(const Shape& shape) {
  const size_t dims = shape.sizes.size();
  const auto bytes = shape.bytes();
  const size_t before = sizeof(Managed) + 2 * dims * sizeof(int64_t) + kAlignment;
  auto* const managed = static_cast<Managed*>(std::malloc(before + static_cast<size_t>(bytes)));
  if (managed == nullptr) throw std::bad_alloc();
  auto* const sizes = reinterpret_cast<int64_t*>(managed + 1);
  int64_t* const strides = std::copy(shape.sizes.begin(), shape.sizes.end(), sizes);
  const auto end =
      reinterpret_cast<uintptr_t>(std::copy(shape.strides.begin(), shape.strides.end(), strides));
  auto* const data = reinterpret_cast<void*>((end + kAlignment - 1) / kAlignment * kAlignment);
  const auto free = [](Managed* self) { std::free(self); };
  *managed = {1,    0, bytes,
              free, 0, {data, {kCpu, 0}, static_cast<int32_t>(dims), shape.type, sizes, strides, 0}};
  managed_.reset(managed);
}

void* Block::data() const { return managed_->array.data; }

py::object Block::to_tensor() && {
  const Exchange* const exchange = torch().exchange;
  if (exchange == nullptr) return copied(managed_->array, managed_->bytes);
  void* made = nullptr;
  if (exchange->owning_to_object(managed_.release(), &made) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(made));
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

bool made_in_inference_mode(PyObject* tensor) { return says(torch().is_inference, tensor); }

bool negated(PyObject* tensor) { return says(torch().is_neg, tensor); }

}  // namespace metafast
