// metafast._C: what Python sees of the native runtime. The types are in metafast/_C.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif
#include <chrono>
#include <span>
#include <thread>

#include "program.hpp"
#include "replay.hpp"
#include "run_kernel.hpp"

namespace py = pybind11;
using namespace metafast;

namespace {

// Takes the GIL back. While the interpreter shuts down, Pythons before 3.14 end a daemon thread that asks for it, by
// unwinding its stack: through frames that cannot be unwound, and releasing objects without the GIL. As in 3.14, such
// a thread sleeps until the process is gone.
void restore_thread(PyThreadState* state) {
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

kernels::DType parse_dtype(const std::string& name) {
  if (name == "f32") return kernels::DType::f32;
  if (name == "f64") return kernels::DType::f64;
  throw py::value_error("dtype: \"f32\" or \"f64\" expected, got \"" + name + "\"");
}

kernels::Isa parse_isa(const std::string& name) {
  if (name == "best") return kernels::best_isa();
  kernels::Isa isa;
  if (!kernels::isa_from_name(name, &isa) || !kernels::isa_available(isa))
    throw py::value_error("isa: \"best\" or one of metafast._C.isas() expected, got \"" + name + "\"");
  return isa;
}

int parse_section(const std::string& name) {
  for (int s = 0; s < kSections; ++s)
    if (kSectionNames[s] == name) return s;
  throw py::value_error("Program: sections are prologue, inner, query, meta and epilogue, got \"" + name +
                        "\"");
}

InstructionSpec parse_instruction(const py::handle& row) {
  if (!py::isinstance<py::sequence>(row) || py::len(row) != 4) throw py::cast_error();
  const py::tuple fields(py::reinterpret_borrow<py::object>(row));
  InstructionSpec spec{fields[0].cast<std::string>(),
                       {},
                       fields[2].cast<std::vector<int64_t>>(),
                       fields[3].cast<std::vector<double>>()};
  for (const auto& [space, offset] : fields[1].cast<std::vector<std::pair<int, int64_t>>>())
    spec.operands.push_back({space, offset});
  return spec;
}

// repr(object), cut short.
std::string shown(const py::handle& object) {
  constexpr size_t kMost = 200;
  const auto text = py::repr(object).cast<std::string>();
  return text.size() <= kMost ? text : text.substr(0, kMost) + "...";
}

std::vector<InstructionSpec> parse_instructions(const std::string& section, const py::handle& rows) {
  const std::string place = "Program: section \"" + section + "\"";
  if (!py::isinstance<py::sequence>(rows) || py::isinstance<py::str>(rows))
    throw py::type_error(place + ": a list of instructions expected, got " + shown(rows));
  std::vector<InstructionSpec> specs;
  for (const py::handle& row : py::list(py::reinterpret_borrow<py::object>(rows))) {
    try {
      specs.push_back(parse_instruction(row));
    } catch (const py::cast_error&) {
      throw py::value_error(
          place + ", instruction " + std::to_string(specs.size()) +
          ": (kernel: str, operands: list[(int, int)], ints: list[int], floats: list[float]) "
          "expected, got " +
          shown(row));
    }
  }
  return specs;
}

std::shared_ptr<Program> make_program(const std::string& dtype, const py::dict& sections, int64_t arena_bytes,
                                      int64_t state_bytes, int64_t adjoint_bytes, int64_t accumulator_bytes,
                                      const py::bytes& constants, int n_external, int lanes,
                                      const std::string& isa) {
  ProgramSpec spec{
      parse_dtype(dtype), parse_isa(isa), {},   {arena_bytes, state_bytes, adjoint_bytes, accumulator_bytes},
      constants,          n_external,     lanes};
  for (const auto& [name, rows] : sections) {
    if (!py::isinstance<py::str>(name))
      throw py::type_error("Program: sections are named, got " + shown(name));
    const auto section = name.cast<std::string>();
    spec.sections[parse_section(section)] = parse_instructions(section, rows);
  }
  return std::make_shared<Program>(std::move(spec));
}

using Externals = py::array_t<int64_t, py::array::c_style>;

PyObject* main_thread = nullptr;  // threading.main_thread

// Python handles signals on its main thread alone.
bool on_main_thread() {
  const py::object thread = py::handle(main_thread)();
  return thread.attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
}

// Lets Python's signal handlers run; whether one of them raised. What it raised stays set for check_signals.
bool signalled() noexcept {
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

void check_signals() {
  if (PyErr_Occurred()) throw py::error_already_set();
}

Call make_call(const Externals& externals, int64_t tasks, int64_t steps, uintptr_t steps_ptr,
               uintptr_t weights_ptr, uintptr_t result_ptr, int threads, uintptr_t cancel_ptr) {
  if (externals.ndim() != 2 || externals.shape(1) != 3)
    throw py::value_error(
        "run: externals of shape (n_external, 3) expected: pointer, task stride, step stride");
  static_assert(sizeof(External) == 3 * sizeof(int64_t));
  return {.externals = {reinterpret_cast<const External*>(externals.data()),
                        static_cast<size_t>(externals.shape(0))},
          .tasks = tasks,
          .steps = steps,
          .steps_of = reinterpret_cast<const int64_t*>(steps_ptr),
          .weights = reinterpret_cast<const void*>(weights_ptr),
          .result = reinterpret_cast<void*>(result_ptr),
          .threads = threads,
          .cancel = reinterpret_cast<const volatile int32_t*>(cancel_ptr),
          .interrupted = on_main_thread() ? &signalled : nullptr};
}

std::string_view section_name(int s) { return s < 0 ? std::string_view() : kSectionNames[s]; }

py::tuple to_tuple(const Outcome& o) {
  return py::make_tuple(o.status, o.task, o.step, section_name(o.section), o.instruction);
}

py::tuple run(const Program& program, const Externals& externals, int64_t tasks, int64_t steps,
              uintptr_t steps_ptr, uintptr_t weights_ptr, uintptr_t result_ptr, int threads,
              uint64_t /*seed*/, uintptr_t cancel_ptr) {
  const Call call =
      make_call(externals, tasks, steps, steps_ptr, weights_ptr, result_ptr, threads, cancel_ptr);
  const Outcome outcome = unlocked([&] { return replay(program, call); });
  check_signals();
  return to_tuple(outcome);
}

// The subnormal, the huge and the negative are finite; an exponent of all ones is not.
template <class Bits, int kMantissa>
bool all_finite_of(const void* values, int64_t count) {
  constexpr Bits exponent = (~Bits{0} << kMantissa) & ~(Bits{1} << (8 * sizeof(Bits) - 1));
  const auto* bits = static_cast<const Bits*>(values);
  bool finite = true;
  for (int64_t k = 0; k < count; ++k) finite &= (bits[k] & exponent) != exponent;
  return finite;
}

bool all_finite(uintptr_t pointer, int64_t count, const std::string& dtype) {
  const auto* values = reinterpret_cast<const void*>(pointer);
  return parse_dtype(dtype) == kernels::DType::f32 ? all_finite_of<uint32_t, 23>(values, count)
                                                   : all_finite_of<uint64_t, 52>(values, count);
}

py::list run_profile(const Program& program, const Externals& externals, int64_t tasks, int64_t steps,
                     uintptr_t steps_ptr, uintptr_t weights_ptr, uintptr_t result_ptr) {
  const Call call = make_call(externals, tasks, steps, steps_ptr, weights_ptr, result_ptr, 1, 0);
  std::array<std::vector<InstructionTime>, kSections> times;
  unlocked([&] { return profile(program, call, times); });
  check_signals();
  py::list rows;
  for (int s = 0; s < kSections; ++s)
    for (size_t n = 0; n < times[s].size(); ++n)
      rows.append(py::make_tuple(kSectionNames[s], n, program.section(s).info[n].kernel->name,
                                 times[s][n].calls, times[s][n].seconds));
  return rows;
}

int run_one_kernel(const std::string& name, const std::string& dtype, const std::string& isa,
                   const std::vector<uintptr_t>& ptrs, const std::vector<int64_t>& ints,
                   const std::vector<double>& floats, int parts) {
  const kernels::DType type = parse_dtype(dtype);
  const kernels::Isa set = parse_isa(isa);
  const std::span operands(reinterpret_cast<void* const*>(ptrs.data()), ptrs.size());
  return unlocked([&] { return run_kernel(name, type, set, operands, ints, floats, parts); });
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int n = 0; n < kernels::kIsaCount; ++n)
    if (const auto isa = static_cast<kernels::Isa>(n); kernels::isa_available(isa))
      names.emplace_back(isa_name(isa));
  return names;
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const kernels::Kernel& kernel : kernels::kernels(kernels::DType::f32, kernels::Isa::baseline))
    names.emplace_back(kernel.name);
  return names;
}

std::vector<std::string> pointwise_opcodes() {
  std::vector<std::string> names;
  for (int n = 0; n < kernels::pointwise_opcode_count(); ++n)
    names.emplace_back(kernels::pointwise_opcode_name(n));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  main_thread = py::object(py::module_::import("threading").attr("main_thread")).release().ptr();
  m.doc() = "The native runtime of metafast: programs, their replay, and single kernels.";

  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init(&make_program), py::arg("dtype"), py::arg("sections"), py::arg("arena_bytes") = 0,
           py::arg("state_bytes") = 0, py::arg("adjoint_bytes") = 0, py::arg("accumulator_bytes") = 0,
           py::arg("constants") = py::bytes(), py::arg("n_external") = 0, py::arg("lanes") = 1,
           py::arg("isa") = "best")
      .def("dump", &Program::dump)
      .def("__repr__", [](const Program& p) { return "<" + p.summary() + ">"; });

  m.def("run", &run, py::arg("program"), py::arg("externals").noconvert(), py::arg("T"), py::arg("steps"),
        py::arg("steps_ptr") = 0, py::arg("weights_ptr") = 0, py::arg("result_ptr") = 0,
        py::arg("threads") = 1, py::arg("seed") = 0, py::arg("cancel_ptr") = 0);
  m.def("profile", &run_profile, py::arg("program"), py::arg("externals").noconvert(), py::arg("T"),
        py::arg("steps"), py::arg("steps_ptr") = 0, py::arg("weights_ptr") = 0, py::arg("result_ptr") = 0);
  m.def("run_kernel", &run_one_kernel, py::arg("name"), py::arg("dtype"), py::arg("isa"), py::arg("ptrs"),
        py::arg("ints"), py::arg("floats"), py::arg("parts") = 1);
  m.def("all_finite", &all_finite, py::arg("pointer"), py::arg("count"), py::arg("dtype"));
  m.def("isas", &isas);
  m.def("vector_bytes", [] { return kernels::vector_bytes(kernels::best_isa()); });
  m.def("kernel_names", &kernel_names);
  m.def("pointwise_opcodes", &pointwise_opcodes);
  m.def("arena_bytes", [] { return unlocked(&arena_bytes); });
  m.def("trim", [] { unlocked(&trim); });
  m.attr("CANCELLED") = kCancelled;
}
