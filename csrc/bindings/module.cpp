// metafast._C: what Python sees of the native runtime. The types are in metafast/_C.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "program.hpp"
#include "replay.hpp"
#include "run_kernel.hpp"

namespace py = pybind11;
using namespace metafast;

namespace {

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

InstructionSpec parse_instruction(const py::tuple& fields) {
  InstructionSpec spec{fields[0].cast<std::string>(),
                       {},
                       fields[2].cast<std::vector<int64_t>>(),
                       fields[3].cast<std::vector<double>>()};
  for (const auto& [space, offset] : fields[1].cast<std::vector<std::pair<int, int64_t>>>())
    spec.operands.push_back({space, offset});
  return spec;
}

std::vector<InstructionSpec> parse_instructions(const std::string& section, const py::sequence& rows) {
  std::vector<InstructionSpec> specs;
  for (size_t n = 0; n < rows.size(); ++n) {
    try {
      const py::tuple fields(rows[n]);
      if (fields.size() != 4) throw py::cast_error();
      specs.push_back(parse_instruction(fields));
    } catch (const py::cast_error&) {
      throw py::value_error(
          "Program: section \"" + section + "\", instruction " + std::to_string(n) +
          ": (kernel: str, operands: list[(int, int)], ints: list[int], floats: list[float]) "
          "expected, got " +
          py::repr(rows[n]).cast<std::string>());
    }
  }
  return specs;
}

std::shared_ptr<Program> make_program(const std::string& dtype, const py::dict& sections, int64_t arena_bytes,
                                      int64_t state_bytes, int64_t adjoint_bytes, int64_t accumulator_bytes,
                                      const py::bytes& constants, int n_external, const std::string& isa) {
  ProgramSpec spec{
      parse_dtype(dtype), parse_isa(isa), {}, {arena_bytes, state_bytes, adjoint_bytes, accumulator_bytes},
      constants,          n_external};
  for (const auto& [name, rows] : sections) {
    const auto section = name.cast<std::string>();
    spec.sections[parse_section(section)] = parse_instructions(section, rows.cast<py::sequence>());
  }
  return std::make_shared<Program>(std::move(spec));
}

using Externals = py::array_t<int64_t, py::array::c_style>;

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
          .cancel = reinterpret_cast<const volatile int32_t*>(cancel_ptr)};
}

std::string_view section_name(int s) { return s < 0 ? std::string_view() : kSectionNames[s]; }

py::tuple to_tuple(const Outcome& o) {
  return py::make_tuple(o.status, o.task, o.step, section_name(o.section), o.instruction);
}

// Ctrl-C and other signals: Python's handlers run here, and an exception that one raises ends the replay.
bool interrupted() {
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

py::tuple run(const Program& program, const Externals& externals, int64_t tasks, int64_t steps,
              uintptr_t steps_ptr, uintptr_t weights_ptr, uintptr_t result_ptr, int threads,
              uint64_t /*seed*/, uintptr_t cancel_ptr) {
  Call call = make_call(externals, tasks, steps, steps_ptr, weights_ptr, result_ptr, threads, cancel_ptr);
  call.interrupted = interrupted;
  Outcome outcome;
  {
    const py::gil_scoped_release unlocked;
    outcome = replay(program, call);
  }
  if (PyErr_Occurred()) throw py::error_already_set();
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
  {
    const py::gil_scoped_release unlocked;
    profile(program, call, times);
  }
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
  const py::gil_scoped_release unlocked;
  return run_kernel(name, type, set, {reinterpret_cast<void* const*>(ptrs.data()), ptrs.size()}, ints, floats,
                    parts);
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
  m.doc() = "The native runtime of metafast: programs, their replay, and single kernels.";

  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init(&make_program), py::arg("dtype"), py::arg("sections"), py::arg("arena_bytes") = 0,
           py::arg("state_bytes") = 0, py::arg("adjoint_bytes") = 0, py::arg("accumulator_bytes") = 0,
           py::arg("constants") = py::bytes(), py::arg("n_external") = 0, py::arg("isa") = "best")
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
  m.def("kernel_names", &kernel_names);
  m.def("pointwise_opcodes", &pointwise_opcodes);
  m.def("arena_bytes", &arena_bytes, py::call_guard<py::gil_scoped_release>());
  m.def("trim", &trim, py::call_guard<py::gil_scoped_release>());
  m.attr("CANCELLED") = kCancelled;
}
