// What every call from Python into the runtime needs: the GIL given away meanwhile, signals looked at.
#pragma once
#include <pybind11/pybind11.h>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif
#include <chrono>
#include <thread>

namespace metafast {

namespace py = pybind11;

// Takes the GIL back. While the interpreter shuts down, Pythons before 3.14 end a daemon thread that asks for it, by
// unwinding its stack: through frames that cannot be unwound, and releasing objects without the GIL. As in 3.14, such
// a thread sleeps until the process is gone.
inline void restore_thread(PyThreadState* state) {
#if defined(__GLIBCXX__)
  try {
    PyEval_RestoreThread(state);
  } catch (const abi::__forced_unwind&) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  PyEval_RestoreThread(state);
#endif
}

// What `work` gives, run without the GIL.
template <class Work>
auto unlocked(Work work) -> decltype(work()) {
  struct Release {
    PyThreadState* state = PyEval_SaveThread();
    ~Release() noexcept(false) { restore_thread(state); }
  } const release;
  return work();
}

using Interrupted = bool (*)() noexcept;

// What a replay on this thread is to ask now and then: whether a signal handler of Python's raised. Null where Python
// handles signals on another thread. What was raised stays set for check_signals.
Interrupted interruption();
void check_signals();

// A name that attributes are looked up by; lives as long as the process.
inline PyObject* interned(const char* name) {
  PyObject* const made = PyUnicode_InternFromString(name);
  if (made == nullptr) throw py::error_already_set();
  return made;
}

// A new reference as an object; what failed is raised.
inline py::object checked(PyObject* reference) {
  if (reference == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(reference);
}

}  // namespace metafast
