#include "places.hpp"

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>

namespace metafast {

void forget_error() {
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
  PyErr_Clear();
}

namespace {

// Whether a new reference is to that object; where it could not be had, it is not.
bool is(PyObject* reference, const py::object& value) {
  if (reference == nullptr) forget_error();
  const bool same = reference == value.ptr();
  Py_XDECREF(reference);
  return same;
}

bool equals(PyObject* reference, const py::object& value) {
  const int equal = reference ? PyObject_RichCompareBool(reference, value.ptr(), Py_EQ) : -1;
  Py_XDECREF(reference);
  if (equal < 0) forget_error();
  return equal == 1;
}

}  // namespace

Places::Kind Places::parse_kind(const std::string& name) {
  constexpr std::string_view kNames[] = {"item",       "attribute", "type",  "cell",
                                         "empty cell", "order",     "answer"};
  for (int n = 0; n < static_cast<int>(std::size(kNames)); ++n)
    if (name == kNames[n]) return static_cast<Kind>(n);
  throw py::value_error("Places: one of the kinds in _C.pyi expected, got \"" + name + "\"");
}

Places::Places(const py::list& places, const py::list& sizes) {
  for (const py::handle& row : places) {
    auto [kind, owner, name, value] = row.cast<std::tuple<std::string, py::object, py::object, py::object>>();
    const Kind parsed = parse_kind(kind);
    const bool cell = parsed == kCell || parsed == kEmptyCell;
    if (cell && !PyCell_Check(owner.ptr())) throw py::type_error("Places: a cell expected");
    if (parsed == kOrder && !(PyDict_Check(owner.ptr()) && PyTuple_Check(value.ptr())))
      throw py::type_error("Places: a dict and a tuple of its keys expected");
    places_.push_back({parsed, std::move(owner), std::move(name), std::move(value)});
  }
  for (const py::handle& row : sizes) {
    auto [container, length] = row.cast<std::pair<py::object, py::ssize_t>>();
    sizes_.push_back({std::move(container), length});
  }
}

bool Places::holds(const Place& place) {
  PyObject* const owner = place.owner.ptr();
  switch (place.kind) {
    case kItem:
      // Of a dict, what is stored: a defaultdict would make what is missing.
      if (!PyDict_Check(owner)) return is(PyObject_GetItem(owner, place.name.ptr()), place.value);
      if (PyObject* const found = PyDict_GetItemWithError(owner, place.name.ptr()))
        return found == place.value.ptr();
      forget_error();
      return false;
    case kAttribute:
      return is(PyObject_GetAttr(owner, place.name.ptr()), place.value);
    case kType:
      return reinterpret_cast<PyObject*>(Py_TYPE(owner)) == place.value.ptr();
    case kCell:
      return PyCell_GET(owner) == place.value.ptr();
    case kEmptyCell:
      return PyCell_GET(owner) == nullptr;
    case kOrder:
      return in_order(owner, place.value.ptr());
    case kAnswer:
      return equals(PyObject_CallNoArgs(owner), place.value);
  }
  return false;
}

// An OrderedDict has an order of its own beside that of the dict it is.
bool Places::in_order(PyObject* dict, PyObject* keys) {
  const Py_ssize_t count = PyTuple_GET_SIZE(keys);
  Py_ssize_t n = 0;
  if (PyDict_CheckExact(dict)) {
    PyObject* key;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, nullptr); ++n)
      if (n >= count || key != PyTuple_GET_ITEM(keys, n)) return false;
    return n == count;
  }
  const py::object now = py::reinterpret_steal<py::object>(PySequence_Tuple(dict));
  if (!now) return forget_error(), false;
  const int equal = PyObject_RichCompareBool(now.ptr(), keys, Py_EQ);
  if (equal < 0) forget_error();
  return equal == 1;
}

bool Places::hold() const {
  if (!known_) return false;
  for (const Size& size : sizes_) {
    const py::ssize_t length = PyObject_Size(size.container.ptr());
    if (length < 0) forget_error();
    if (length != size.length) return false;
  }
  for (const Place& place : places_)
    if (!holds(place)) return false;
  return true;
}

int Places::traverse(visitproc visit, void* arg) const {
  for (const Place& place : places_) {
    Py_VISIT(place.owner.ptr());
    Py_VISIT(place.name.ptr());
    Py_VISIT(place.value.ptr());
  }
  for (const Size& size : sizes_) Py_VISIT(size.container.ptr());
  return 0;
}

// What is let go may call back: it is taken out first.
void Places::clear() {
  std::vector<Place> places;
  std::vector<Size> sizes;
  places.swap(places_), sizes.swap(sizes_);
  known_ = false;
}

Slots::Slot Slots::parse_slot(py::object store, py::object key) {
  if (!PyDict_Check(store.ptr())) throw py::type_error("Slots: a dict expected");
  return {std::move(store), std::move(key)};
}

Slots::Slots(const py::list& slots, const py::list& ties) {
  for (const py::handle& row : slots) {
    auto [store, key] = row.cast<std::pair<py::object, py::object>>();
    slots_.push_back(parse_slot(std::move(store), std::move(key)));
  }
  for (const py::handle& row : ties) {
    auto [slot, store, key] = row.cast<std::tuple<size_t, py::object, py::object>>();
    if (slot >= slots_.size()) throw py::value_error("Slots: a tie to one of the slots expected");
    ties_.push_back({slot, parse_slot(std::move(store), std::move(key))});
  }
}

// Borrowed; null where there is none.
PyObject* Slots::held(const Slot& slot) {
  PyObject* const found = PyDict_GetItemWithError(slot.store.ptr(), slot.key.ptr());
  if (found == nullptr) forget_error();
  return found == Py_None ? nullptr : found;
}

py::object Slots::read() const {
  py::list tensors(slots_.size());
  if (!read_into(tensors.ptr(), 0)) return py::none();
  return tensors;
}

bool Slots::read_into(PyObject* list, py::ssize_t at) const {
  std::vector<PyObject*> apart;
  apart.reserve(slots_.size());
  for (const Slot& slot : slots_) {
    PyObject* const found = held(slot);
    if (found == nullptr) return false;
    PyList_SET_ITEM(list, at++, Py_NewRef(found));
    apart.push_back(found);
  }
  for (const Tie& tie : ties_)
    if (held(tie.other) != apart[tie.slot]) return false;
  std::sort(apart.begin(), apart.end());
  return std::adjacent_find(apart.begin(), apart.end()) == apart.end();
}

int Slots::traverse(visitproc visit, void* arg) const {
  for (const Slot& slot : slots_) {
    Py_VISIT(slot.store.ptr());
    Py_VISIT(slot.key.ptr());
  }
  for (const Tie& tie : ties_) {
    Py_VISIT(tie.other.store.ptr());
    Py_VISIT(tie.other.key.ptr());
  }
  return 0;
}

void Slots::clear() {
  std::vector<Slot> slots;
  std::vector<Tie> ties;
  slots.swap(slots_), ties.swap(ties_);
}

PyObject* const* Facts::single_names() {
  static PyObject* const names[kSingle] = {interned("dtype"), interned("requires_grad"), interned("layout"),
                                           interned("is_nested")};
  return names;
}

PyObject* const* Facts::equal_names() {
  static PyObject* const names[kEqual] = {interned("shape"), interned("device")};
  return names;
}

Facts::Facts(const py::list& tensors) {
  for (const py::handle& tensor : tensors) tensors_.push_back(known(tensor.ptr()));
}

Facts::Tensor Facts::known(PyObject* tensor) {
  Tensor facts;
  facts.type = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
  if (View now; view(tensor, &now)) {
    facts.viewed = true;
    facts.wants = requires_grad(tensor);
    facts.device = now.device;
    facts.dtype = now.type;
    facts.shape.assign(now.shape, now.shape + now.dims);
    return facts;
  }
  for (int n = 0; n < kSingle; ++n) facts.single[n] = checked(PyObject_GetAttr(tensor, single_names()[n]));
  for (int n = 0; n < kEqual; ++n) facts.equal[n] = checked(PyObject_GetAttr(tensor, equal_names()[n]));
  return facts;
}

bool Facts::same_view(const Tensor& known, PyObject* tensor) {
  View now;
  return view(tensor, &now) && now.type == known.dtype && now.device == known.device &&
         std::equal(known.shape.begin(), known.shape.end(), now.shape, now.shape + now.dims) &&
         requires_grad(tensor) == known.wants;
}

bool Facts::same(const Tensor& known, PyObject* tensor) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != known.type.ptr()) return false;
  if (known.viewed) return same_view(known, tensor);
  for (int n = 0; n < kSingle; ++n)
    if (!is(PyObject_GetAttr(tensor, single_names()[n]), known.single[n])) return false;
  for (int n = 0; n < kEqual; ++n)
    if (!equals(PyObject_GetAttr(tensor, equal_names()[n]), known.equal[n])) return false;
  return true;
}

bool Facts::hold(const py::list& tensors) const {
  if (tensors.size() != tensors_.size() || !hold_in(tensors.ptr(), 0, 0, tensors_.size())) return false;
  return std::ranges::none_of(tensors, [](const py::handle& t) { return made_in_inference_mode(t.ptr()); });
}

bool Facts::hold_in(PyObject* list, py::ssize_t at, size_t first, size_t count) const {
  for (size_t n = first; n < first + count; ++n)
    if (!same(tensors_[n], PyList_GET_ITEM(list, at++))) return false;
  return true;
}

}  // namespace metafast
