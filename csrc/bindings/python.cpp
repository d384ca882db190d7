#include "python.hpp"

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace metafast {
namespace {

bool signalled() noexcept {
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

// Python's main thread; 0 as long as nobody asked.
std::atomic<unsigned long> main_thread{0};

unsigned long find_main_thread() {
  const unsigned long found =
      py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
#if defined(__unix__) || defined(__APPLE__)
  // In a child the thread that forked takes its place.
  static const int forgets = pthread_atfork(nullptr, nullptr, [] { main_thread.store(0); });
  if (forgets != 0) return found;
#endif
  main_thread.store(found, std::memory_order_relaxed);
  return found;
}

}  // namespace

// Python handles signals on its main thread alone.
Interrupted interruption() {
  const unsigned long known = main_thread.load(std::memory_order_relaxed);
  return (known ? known : find_main_thread()) == PyThread_get_thread_ident() ? &signalled : nullptr;
}

void check_signals() {
  if (PyErr_Occurred()) throw py::error_already_set();
}

}  // namespace metafast
