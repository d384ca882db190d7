// metafast._C: what Python sees of the native runtime. The types are in metafast/_C.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <span>

#include "binding.hpp"
#include "kernels/code/memory.hpp"
#include "places.hpp"
#include "program.hpp"
#include "python.hpp"
#include "repeat.hpp"
#include "replay.hpp"
#include "round_trip.hpp"
#include "run_kernel.hpp"

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

// Members of members are parsed, so that the program can say why it takes none; a list may hold itself, so no deeper.
constexpr int kDeepest = 2;

InstructionSpec parse_instruction(const py::handle& row, int depth = 0) {
  if (depth > kDeepest) throw py::cast_error();
  if (!py::isinstance<py::sequence>(row) || py::len(row) < 4 || py::len(row) > 5) throw py::cast_error();
  const py::tuple fields(py::reinterpret_borrow<py::object>(row));
  InstructionSpec spec{fields[0].cast<std::string>(),
                       {},
                       fields[2].cast<std::vector<int64_t>>(),
                       fields[3].cast<std::vector<double>>()};
  for (const auto& operand : fields[1].cast<std::vector<std::vector<int64_t>>>()) {
    if (operand.size() < 2 || operand.size() > 3 || operand[0] != static_cast<int>(operand[0]))
      throw py::cast_error();
    const int64_t stride = operand.size() == 3 ? operand[2] : 0;
    spec.operands.push_back({static_cast<int>(operand[0]), operand[1], stride});
  }
  if (fields.size() < 5) return spec;
  if (!py::isinstance<py::sequence>(fields[4])) throw py::cast_error();
  for (const py::handle& member : fields[4]) spec.members.push_back(parse_instruction(member, depth + 1));
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
          "and, of chunks, members expected, got " +
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

// All accumulators at one address, or dropped.
class Result {
 public:
  Result(const Program& program, uintptr_t pointer)
      : sum_{0, program.sizes().accumulator, reinterpret_cast<void*>(pointer)} {}
  std::span<const Sum> sums() const { return {&sum_, sum_.into ? size_t{1} : size_t{0}}; }

 private:
  const Sum sum_;
};

Portion make_portion(const Program& program, const Externals& externals, int64_t tasks) {
  if (externals.ndim() != 2 || externals.shape(1) != 3)
    throw py::value_error(
        "run: externals of shape (n_external, 3) expected: pointer, task stride, step stride");
  static_assert(sizeof(External) == 3 * sizeof(int64_t));
  const auto* rows = reinterpret_cast<const External*>(externals.data());
  return {&program, {rows, static_cast<size_t>(externals.shape(0))}, tasks};
}

py::tuple run(const Program& program, const Externals& externals, int64_t tasks, int64_t steps,
              uintptr_t steps_ptr, uintptr_t weights_ptr, uintptr_t result_ptr, int threads,
              uint64_t /*seed*/, uintptr_t cancel_ptr, int64_t every) {
  const Result result(program, result_ptr);
  const Portion all = make_portion(program, externals, tasks);
  const Call call{.portions = {&all, 1},
                  .steps = steps,
                  .steps_of = reinterpret_cast<const int64_t*>(steps_ptr),
                  .every = every,
                  .weights = reinterpret_cast<const void*>(weights_ptr),
                  .sums = result.sums(),
                  .threads = threads,
                  .cancel = reinterpret_cast<const volatile int32_t*>(cancel_ptr),
                  .interrupted = interruption()};
  return to_tuple(run_call(call));
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

// Lets the garbage collector look into it, and empty it where it can be.
template <class Holder>
void collect(PyHeapTypeObject* heap_type) {
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    return py::detail::is_holder_constructed(self)
               ? py::handle(self).cast<const Holder&>().traverse(visit, arg)
               : 0;
  };
  type->tp_clear = [](PyObject* self) {
    if constexpr (requires(Holder& holder) { holder.clear(); })
      if (py::detail::is_holder_constructed(self)) py::handle(self).cast<Holder&>().clear();
    return 0;
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native runtime of metafast: programs, their replay, and single kernels.";

  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init(&make_program), py::arg("dtype"), py::arg("sections"), py::arg("arena_bytes") = 0,
           py::arg("state_bytes") = 0, py::arg("adjoint_bytes") = 0, py::arg("accumulator_bytes") = 0,
           py::arg("constants") = py::bytes(), py::arg("n_external") = 0, py::arg("lanes") = 1,
           py::arg("isa") = "best")
      .def("kept_bytes", &Program::kept_bytes)
      .def("dump", &Program::dump)
      .def("__repr__", [](const Program& p) { return "<" + p.summary() + ">"; });

  py::class_<Binding>(m, "Binding")
      .def(py::init<const py::list&, int64_t, const py::list&, const py::list&, const py::list&, bool,
                    int64_t>(),
           py::arg("portions"), py::arg("steps"), py::arg("given"), py::arg("rooms"), py::arg("sums"),
           py::arg("total"), py::arg("every") = 1)
      .def("run", &Binding::run, py::arg("tensors"), py::arg("weights"), py::arg("divisor"),
           py::arg("threads"), py::arg("losses"))
      .def("profile", &Binding::profile, py::arg("tensors"), py::arg("weights"));

  py::class_<Places>(m, "Places", py::custom_type_setup(&collect<Places>))
      .def(py::init<const py::list&, const py::list&>(), py::arg("places"), py::arg("sizes"))
      .def("hold", &Places::hold);
  py::class_<Slots>(m, "Slots", py::custom_type_setup(&collect<Slots>))
      .def(py::init<const py::list&, const py::list&>(), py::arg("slots"), py::arg("ties"))
      .def("read", &Slots::read);
  py::class_<Facts>(m, "Facts")
      .def(py::init<const py::list&>(), py::arg("tensors"))
      .def("hold", &Facts::hold, py::arg("tensors"));

  py::class_<Repeat>(m, "Repeat", py::custom_type_setup(&collect<Repeat>))
      .def(py::init([](const py::list& places, const py::list& options, py::object parameters,
                       py::object buffers, py::object numbers, py::tuple hyper, py::object find_hyper,
                       py::ssize_t like, const py::list& externs, py::object facts, py::object buffer_facts,
                       std::pair<py::ssize_t, py::ssize_t> batches) {
             return std::make_unique<Repeat>(
                 places, options, Held<Slots>(std::move(parameters)), Held<Slots>(std::move(buffers)),
                 Held<Places>(std::move(numbers)), std::move(hyper), std::move(find_hyper), like, externs,
                 Held<Facts>(std::move(facts)), Held<Facts>(std::move(buffer_facts)), batches);
           }),
           py::arg("places"), py::arg("options"), py::arg("parameters"), py::arg("buffers"),
           py::arg("numbers"), py::arg("hyper"), py::arg("find_hyper"), py::arg("like"), py::arg("externs"),
           py::arg("facts"), py::arg("buffer_facts"), py::arg("batches"))
      .def("read", &Repeat::read, py::arg("options"), py::arg("support"), py::arg("query"));
  py::class_<Ready>(m, "Ready", py::custom_type_setup(&collect<Ready>))
      .def(py::init([](py::object binding, const py::list& picks, py::object weights, int64_t divisor,
                       int threads, py::object places) {
             return std::make_unique<Ready>(Held<Binding>(std::move(binding)), picks, std::move(weights),
                                            divisor, threads, Held<Places>(std::move(places)));
           }),
           py::arg("binding"), py::arg("picks"), py::arg("weights"), py::arg("divisor"), py::arg("threads"),
           py::arg("places"))
      .def("run", &Ready::run, py::arg("tensors"));

  m.def("run", &run, py::arg("program"), py::arg("externals").noconvert(), py::arg("T"), py::arg("steps"),
        py::arg("steps_ptr") = 0, py::arg("weights_ptr") = 0, py::arg("result_ptr") = 0,
        py::arg("threads") = 1, py::arg("seed") = 0, py::arg("cancel_ptr") = 0, py::arg("every") = 1);
  m.def("run_kernel", &run_one_kernel, py::arg("name"), py::arg("dtype"), py::arg("isa"), py::arg("ptrs"),
        py::arg("ints"), py::arg("floats"), py::arg("parts") = 1);
  m.def("round_trip", [] { return unlocked(&round_trip); });
  m.def("isas", &isas);
  m.def("vector_bytes", [] { return kernels::vector_bytes(kernels::best_isa()); });
  m.def("kernel_names", &kernel_names);
  m.def("pointwise_opcodes", &pointwise_opcodes);
  m.def("winograd_pays", &kernels::winograd_pays, py::arg("height"), py::arg("width"), py::arg("images"),
        py::arg("channels"), py::arg("columns"));
  m.def("winograd_down_pays", &kernels::winograd_down_pays, py::arg("height"), py::arg("width"),
        py::arg("images"), py::arg("channels"), py::arg("columns"));
  m.def("winograd_filter_elements", &kernels::winograd_filter_elements, py::arg("channels"),
        py::arg("columns"));
  m.def("code_pieces", &kernels::code::pieces_installed);
  m.def("arena_bytes", [] { return unlocked(&arena_bytes); });
  m.def("trim", [] { unlocked(&trim); });
  m.def("return_free_pages", &return_free_pages);
  m.attr("CANCELLED") = kCancelled;
  m.attr("MOST_GROUPS") = kMaxGroups;
  m.attr("SOURCES") = METAFAST_SOURCES;
}
