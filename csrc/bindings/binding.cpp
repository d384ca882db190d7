#include "binding.hpp"

#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <utility>

namespace metafast {
namespace {

py::object attribute(const py::handle& object, PyObject* name) {
  return checked(PyObject_GetAttr(object.ptr(), name));
}

py::object call_method(const py::handle& object, PyObject* name) {
  return checked(PyObject_CallMethodNoArgs(object.ptr(), name));
}

// Whether a kernel may read the tensor where it lies, through its attributes.
bool readable(const py::handle& tensor, const py::object& dtype) {
  static PyObject* const of_dtype = interned("dtype");
  static PyObject* const contiguous = interned("is_contiguous");
  static PyObject* const is_neg = interned("is_neg");  // a sign that is not in memory
  return attribute(tensor, of_dtype).is(dtype) && call_method(tensor, contiguous).ptr() == Py_True &&
         call_method(tensor, is_neg).ptr() == Py_False;
}

// torch.float32, torch.float64 or torch.int64 as a view shows it.
View::Type as_viewed(const py::object& dtype) {
  const auto name = py::str(dtype).cast<std::string>();
  const bool whole = name == "torch.int64";
  return {static_cast<uint8_t>(whole ? 0 : 2), static_cast<uint8_t>(name == "torch.float32" ? 32 : 64), 1};
}

View::Type as_viewed(kernels::DType dtype) {
  return {2, static_cast<uint8_t>(dtype == kernels::DType::f32 ? 32 : 64), 1};
}

int64_t address(const py::handle& tensor) {
  if (View now; view(tensor.ptr(), &now)) return now.address();
  static PyObject* const data_ptr = interned("data_ptr");
  const auto found = static_cast<int64_t>(PyLong_AsUnsignedLongLong(call_method(tensor, data_ptr).ptr()));
  if (PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// The subnormal, the huge and the negative are finite; an exponent of all ones is not.
template <class Bits, int kMantissa>
bool all_finite(const void* values, int64_t count) {
  constexpr Bits exponent = (~Bits{0} << kMantissa) & ~(Bits{1} << (8 * sizeof(Bits) - 1));
  const auto* bits = static_cast<const Bits*>(values);
  bool finite = true;
  for (int64_t k = 0; k < count; ++k) finite &= (bits[k] & exponent) != exponent;
  return finite;
}

bool all_finite(const void* values, int64_t count, kernels::DType dtype) {
  return dtype == kernels::DType::f32 ? all_finite<uint32_t, 23>(values, count)
                                      : all_finite<uint64_t, 52>(values, count);
}

double sum(const void* values, int64_t count, kernels::DType dtype) {
  double total = 0;
  if (dtype == kernels::DType::f64) {
    for (int64_t k = 0; k < count; ++k) total += static_cast<const double*>(values)[k];
    return total;
  }
  for (int64_t k = 0; k < count; ++k) total += static_cast<double>(static_cast<const float*>(values)[k]);
  return total;
}

std::string_view section_name(int s) { return s < 0 ? std::string_view() : kSectionNames[s]; }

std::span<PyObject* const> items(const py::list& list) {
  return {PySequence_Fast_ITEMS(list.ptr()), list.size()};
}

void put(const py::dict& into, const py::object& key, Block& block) {
  if (PyDict_SetItem(into.ptr(), key.ptr(), std::move(block).to_tensor().ptr()) != 0)
    throw py::error_already_set();
}

}  // namespace

Outcome run_call(const Call& call) {
  const Outcome outcome = unlocked([&] { return replay(call); });
  check_signals();
  return outcome;
}

py::tuple to_tuple(const Outcome& o) {
  return py::make_tuple(o.status, o.task, o.step, section_name(o.section), o.instruction);
}

struct Binding::Bound {
  std::vector<int64_t> addresses;  // of the tensors
  std::vector<metafast::External> externals;
  std::vector<Portion> portions;  // of these
  std::vector<Sum> sums;
  std::vector<Block> rooms, results;
  int64_t weights = 0;
  int refused = -1;  // the tensor that no kernel may read where it lies
};

Binding::Binding(const py::list& portions, int64_t steps, const py::list& given, const py::list& rooms,
                 const py::list& sums, bool total, int64_t every)
    : steps_(steps),
      every_(every),
      tensors_(static_cast<int64_t>(given.size() + rooms.size())),
      total_(total) {
  for (const py::handle& row : portions) add_portion(row);
  if (portions_.empty()) throw py::value_error("Binding: a portion of the tasks expected, got none");
  for (const py::handle& row : given) {
    auto [tensor, type] = row.cast<std::pair<int, py::object>>();
    require_tensor(tensor);
    const View::Type viewed = as_viewed(type);
    given_.push_back({tensor, std::move(type), viewed});
  }
  for (const py::handle& row : rooms) {
    auto [key, tensor, sizes, strides, zero, looked, summed] =
        row.cast<std::tuple<py::object, int, py::object, py::object, bool, int64_t, int64_t>>();
    require_tensor(tensor);
    rooms_.push_back({std::move(key), tensor, shape(sizes, strides), zero, looked, summed});
  }
  for (const py::handle& row : sums) {
    auto [key, offset, sizes, strides] = row.cast<std::tuple<py::object, int64_t, py::object, py::object>>();
    wanted_.push_back({std::move(key), offset, shape(sizes, strides)});
  }
}

Shape Binding::shape(const py::handle& sizes, const py::handle& strides) const {
  using Numbers = std::vector<int64_t>;
  return {sizes.cast<Numbers>(), strides.cast<Numbers>(), as_viewed(dtype())};
}

void Binding::add_portion(const py::handle& row) {
  using Rows = std::vector<std::array<int64_t, 4>>;
  auto [program, tasks, externals] = row.cast<std::tuple<std::shared_ptr<Program>, int64_t, Rows>>();
  if (externals.size() != static_cast<size_t>(program->n_external()))
    throw py::value_error("Binding: " + std::to_string(program->n_external()) +
                          " externals expected: (tensor, offset, task stride, step stride), got " +
                          std::to_string(externals.size()));
  Own own{program, tasks, {}};
  for (const auto& [tensor, offset, task_stride, step_stride] : externals) {
    require_tensor(tensor);
    own.externals.push_back({tensor, offset, task_stride, step_stride});
  }
  portions_.push_back(std::move(own));
}

void Binding::require_tensor(int64_t tensor) const {
  if (tensor < 0 || tensor >= tensors_)
    throw py::value_error("Binding: tensors 0 to " + std::to_string(tensors_ - 1) + " expected, got " +
                          std::to_string(tensor));
}

std::optional<int64_t> Binding::Given::where(const py::handle& tensor) const {
  if (View now; view(tensor.ptr(), &now)) {
    const bool lies_ready = now.type == viewed && now.contiguous() && !negated(tensor.ptr());
    return lies_ready ? std::optional(now.address()) : std::nullopt;
  }
  return readable(tensor, dtype) ? std::optional(address(tensor)) : std::nullopt;
}

Binding::Bound Binding::bind(std::span<PyObject* const> tensors, const py::object& weights) const {
  if (tensors.size() != given_.size())
    throw py::value_error("Binding: " + std::to_string(given_.size()) + " tensors expected, got " +
                          std::to_string(tensors.size()));
  Bound bound;
  bound.addresses.resize(static_cast<size_t>(tensors_));
  for (size_t n = 0; n < given_.size(); ++n) {
    const std::optional<int64_t> found = given_[n].where(tensors[n]);
    if (!found) {
      bound.refused = static_cast<int>(n);
      return bound;
    }
    bound.addresses[given_[n].tensor] = *found;
  }
  if (!weights.is_none()) bound.weights = address(weights);
  for (const Room& wanted : rooms_) {
    void* const data = bound.rooms.emplace_back(wanted.shape).data();
    if (wanted.zero) std::memset(data, 0, static_cast<size_t>(wanted.shape.bytes()));
    bound.addresses[wanted.tensor] = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
  }
  for (const Wanted& wanted : wanted_) {
    void* const data = bound.results.emplace_back(wanted.shape).data();
    bound.sums.push_back({wanted.offset, wanted.shape.bytes(), data});
  }
  for (const Own& own : portions_)
    for (const External& e : own.externals)
      bound.externals.push_back({bound.addresses[e.tensor] + e.offset, e.task_stride, e.step_stride});
  std::span<const metafast::External> rest = bound.externals;
  for (const Own& own : portions_) {
    bound.portions.push_back({own.program.get(), rest.first(own.externals.size()), own.tasks});
    rest = rest.subspan(own.externals.size());
  }
  return bound;
}

Call Binding::call(const Bound& bound, int threads) const {
  return {.portions = bound.portions,
          .steps = steps_,
          .every = every_,
          .weights = reinterpret_cast<const void*>(bound.weights),
          .sums = bound.sums,
          .threads = threads,
          .interrupted = interruption()};
}

Binding::Losses Binding::look(const Bound& bound) const {
  Losses losses{true, 0};
  for (const Room& made : rooms_) {
    const auto* values = reinterpret_cast<const void*>(bound.addresses[made.tensor]);
    losses.finite &= all_finite(values, made.looked, dtype());
    losses.total += sum(values, made.summed, dtype());
  }
  return losses;
}

// As tensors, by key; those of losses where they are asked for.
py::dict Binding::rooms(Bound& bound, bool losses) const {
  py::dict made;
  for (size_t n = 0; n < rooms_.size(); ++n)
    if (losses || !rooms_[n].looked) put(made, rooms_[n].key, bound.rooms[n]);
  return made;
}

py::dict Binding::sums(Bound& bound) const {
  py::dict made;
  for (size_t n = 0; n < wanted_.size(); ++n) put(made, wanted_[n].key, bound.results[n]);
  return made;
}

py::object Binding::total(double value) const {
  if (!total_) return py::none();
  Block made({{}, {}, as_viewed(dtype())});
  if (dtype() == kernels::DType::f32)
    *static_cast<float*>(made.data()) = static_cast<float>(value);
  else
    *static_cast<double*>(made.data()) = value;
  return std::move(made).to_tensor();
}

py::object Binding::run(const py::list& tensors, const py::object& weights, int64_t divisor, int threads,
                        bool losses) const {
  Bound bound = bind(items(tensors), weights);
  if (bound.refused >= 0) return py::int_(bound.refused);
  const Outcome outcome = run_call(call(bound, threads));
  if (outcome.status) return py::make_tuple(to_tuple(outcome), py::dict(), py::dict(), false, py::none());
  const Losses found = look(bound);
  return py::make_tuple(py::none(), rooms(bound, losses || !found.finite), sums(bound), found.finite,
                        total(found.total / static_cast<double>(divisor)));
}

py::object Binding::run_again(std::span<PyObject* const> tensors, const py::object& weights, int64_t divisor,
                              int threads) const {
  Bound bound = bind(tensors, weights);
  if (bound.refused >= 0 || run_call(call(bound, threads)).status) return py::none();
  const Losses found = look(bound);
  if (!found.finite) return py::none();
  py::tuple gradients(wanted_.size());
  for (size_t n = 0; n < wanted_.size(); ++n) gradients[n] = std::move(bound.results[n]).to_tensor();
  return py::make_tuple(total(found.total / static_cast<double>(divisor)), std::move(gradients));
}

py::object Binding::profile(const py::list& tensors, const py::object& weights) const {
  const Bound bound = bind(items(tensors), weights);
  if (bound.refused >= 0) return py::int_(bound.refused);
  std::vector<Times> times;
  const Call on_one_thread = call(bound, 1);
  unlocked([&] { return metafast::profile(on_one_thread, times); });
  check_signals();
  py::list portions;
  for (size_t p = 0; p < portions_.size(); ++p) portions.append(shown(*portions_[p].program, times[p]));
  return portions;
}

py::list Binding::shown(const Program& program, const Times& times) {
  py::list rows;
  for (int s = 0; s < kSections; ++s)
    for (size_t n = 0; n < times[s].size(); ++n)
      rows.append(py::make_tuple(kSectionNames[s], n, program.section(s).info[n].kernel->name,
                                 times[s][n].calls, times[s][n].seconds));
  return rows;
}

}  // namespace metafast
