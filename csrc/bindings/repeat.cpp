#include "repeat.hpp"

namespace metafast {
namespace {

// The items of a tuple of so many into `list`, from `at` on.
bool items_into(PyObject* list, py::ssize_t at, const py::handle& batch, py::ssize_t count) {
  if (!PyTuple_CheckExact(batch.ptr()) || PyTuple_GET_SIZE(batch.ptr()) != count) return false;
  for (py::ssize_t n = 0; n < count; ++n)
    PyList_SET_ITEM(list, at + n, Py_NewRef(PyTuple_GET_ITEM(batch.ptr(), n)));
  return true;
}

}  // namespace

Repeat::Repeat(const py::list& places, const py::list& options, Held<Slots> parameters, Held<Slots> buffers,
               Held<Places> numbers, py::tuple hyper, py::object find_hyper, py::ssize_t like,
               const py::list& externs, Held<Facts> facts, Held<Facts> buffer_facts,
               std::pair<py::ssize_t, py::ssize_t> batches)
    : parameters_(std::move(parameters)),
      buffers_(std::move(buffers)),
      numbers_(std::move(numbers)),
      hyper_(std::move(hyper)),
      find_hyper_(std::move(find_hyper)),
      like_(like),
      facts_(std::move(facts)),
      buffer_facts_(std::move(buffer_facts)),
      support_(batches.first),
      query_(batches.second) {
  for (const py::handle& each : places) places_.emplace_back(py::reinterpret_borrow<py::object>(each));
  for (const py::handle& each : options) options_.push_back(each.cast<std::pair<py::object, py::object>>());
  for (const py::handle& each : externs) {
    if (!PyWeakref_Check(each.ptr())) throw py::type_error("Repeat: weak references to tensors expected");
    externs_.push_back(py::reinterpret_borrow<py::object>(each));
  }
  const bool counted =
      support_ >= 0 && query_ >= 0 && like_ >= 0 && like_ < static_cast<py::ssize_t>(parameters_->size());
  const size_t tensors =
      parameters_->size() + hyper_.size() + static_cast<size_t>(support_ + query_) + externs_.size();
  if (!counted || facts_->size() != tensors || buffer_facts_->size() != buffers_->size())
    throw py::value_error("Repeat: facts of every tensor expected");
}

bool Repeat::read_hyper(PyObject* list, py::ssize_t at) const {
  const auto count = static_cast<py::ssize_t>(hyper_.size());
  if (numbers_ && numbers_->hold()) return items_into(list, at, hyper_, count);
  return items_into(list, at, find_hyper_(py::handle(PyList_GET_ITEM(list, like_))), count);
}

// In which calls differ that take turns; so first of all.
bool Repeat::read_batches(PyObject* list, const py::handle& support, const py::handle& query) const {
  const size_t first = parameters_->size() + hyper_.size();
  const auto at = static_cast<py::ssize_t>(first), end = at + support_ + query_;
  if (!items_into(list, at, support, support_) || !items_into(list, at + support_, query, query_))
    return false;
  if (!facts_->hold_in(list, at, first, static_cast<size_t>(end - at))) return false;
  for (py::ssize_t n = at; n < end; ++n)  // of such a tensor of a batch a copy would be taken
    if (made_in_inference_mode(PyList_GET_ITEM(list, n))) return false;
  return true;
}

bool Repeat::read_others(PyObject* list) const {
  const auto hyper = static_cast<py::ssize_t>(parameters_->size());
  const size_t before = parameters_->size() + hyper_.size(), behind = facts_->size() - externs_.size();
  if (!parameters_->read_into(list, 0) || !read_hyper(list, hyper)) return false;
  auto at = static_cast<py::ssize_t>(behind);
  for (const py::object& tensor : externs_)
    PyList_SET_ITEM(list, at++, checked(PyObject_CallNoArgs(tensor.ptr())).release().ptr());
  return facts_->hold_in(list, 0, 0, before) &&
         facts_->hold_in(list, static_cast<py::ssize_t>(behind), behind, externs_.size()) &&
         buffers_->read_into(list, at) && buffer_facts_->hold_in(list, at, 0, buffer_facts_->size());
}

py::object Repeat::read(const py::dict& options, const py::handle& support, const py::handle& query) const {
  for (const auto& [name, value] : options_)
    if (PyDict_GetItemWithError(options.ptr(), name.ptr()) != value.ptr()) return forget_error(), py::none();
  py::list tensors(facts_->size() + buffers_->size());
  PyObject_GC_UnTrack(tensors.ptr());  // it has gaps, and code that runs meanwhile may ask for all lists
  if (!read_batches(tensors.ptr(), support, query)) return py::none();
  for (const Held<Places>& places : places_)
    if (!places->hold()) return py::none();
  if (!read_others(tensors.ptr())) return py::none();
  PyObject_GC_Track(tensors.ptr());
  return tensors;
}

int Repeat::traverse(visitproc visit, void* arg) const {
  for (const Held<Places>& places : places_) Py_VISIT(places.owner.ptr());
  for (const auto& [name, value] : options_) Py_VISIT(value.ptr());
  for (const py::object& tensor : externs_) Py_VISIT(tensor.ptr());
  Py_VISIT(parameters_.owner.ptr());
  Py_VISIT(buffers_.owner.ptr());
  Py_VISIT(numbers_.owner.ptr());
  Py_VISIT(hyper_.ptr());
  Py_VISIT(find_hyper_.ptr());
  return 0;
}

Ready::Ready(Held<Binding> binding, const py::list& picks, py::object weights, int64_t divisor, int threads,
             Held<Places> places)
    : binding_(std::move(binding)),
      weights_(std::move(weights)),
      divisor_(divisor),
      threads_(threads),
      places_(std::move(places)) {
  for (const py::handle& each : picks) {
    const bool fixed = !PyLong_Check(each.ptr());
    picks_.push_back({fixed ? -1 : each.cast<py::ssize_t>(), py::reinterpret_borrow<py::object>(each)});
  }
}

py::object Ready::run(const py::list& tensors) const {
  if (!places_->hold()) return py::none();
  std::vector<PyObject*> picked;
  picked.reserve(picks_.size());
  for (const Pick& pick : picks_) {
    if (pick.at >= static_cast<py::ssize_t>(tensors.size()))
      throw py::value_error("Ready: as many tensors as of the first call expected");
    picked.push_back(pick.at < 0 ? pick.tensor.ptr() : PyList_GET_ITEM(tensors.ptr(), pick.at));
  }
  return binding_->run_again(picked, weights_, divisor_, threads_);
}

int Ready::traverse(visitproc visit, void* arg) const {
  for (const Pick& pick : picks_) Py_VISIT(pick.tensor.ptr());
  Py_VISIT(weights_.ptr());
  Py_VISIT(places_.owner.ptr());
  return 0;
}

}  // namespace metafast
