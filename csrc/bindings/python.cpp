#include "python.hpp"

namespace metafast {
namespace {

bool signalled() noexcept {
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

}  // namespace

// Python handles signals on its main thread alone.
Interrupted interruption() {
  static PyObject* const main_thread =
      py::object(py::module_::import("threading").attr("main_thread")).release().ptr();
  const py::object thread = py::handle(main_thread)();
  return thread.attr("ident").cast<unsigned long>() == PyThread_get_thread_ident() ? &signalled : nullptr;
}

void check_signals() {
  if (PyErr_Occurred()) throw py::error_already_set();
}

}  // namespace metafast
