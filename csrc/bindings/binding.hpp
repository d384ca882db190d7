// What one call does between Python's tensors and the replay: read addresses, make room, run, look at the losses.
#pragma once
#include <pybind11/numpy.h>

#include <optional>
#include <vector>

#include "program.hpp"
#include "python.hpp"
#include "replay.hpp"
#include "tensors.hpp"

namespace metafast {

using Strides = py::array_t<int64_t, py::array::c_style>;

class Binding {
 public:
  // As in metafast/_C.pyi.
  Binding(std::shared_ptr<const Program> program, int64_t tasks, int64_t steps, const Strides& strides,
          const py::list& given, const py::list& rooms, const py::list& sums, py::object total,
          int64_t every);

  py::object run(const py::list& tensors, const py::object& weights, int64_t divisor, int threads) const;
  py::object profile(const py::list& tensors, const py::object& weights) const;

 private:
  struct Given {
    int external;
    py::object dtype;
    View::Type viewed;
    // Its address, if a kernel may read it there.
    std::optional<int64_t> where(const py::handle& tensor) const;
  };
  struct Room {
    int external;
    py::object make;
    int64_t looked, summed;  // how many elements, from the first on, are to be finite; are summed
  };
  struct Wanted {
    int64_t offset, bytes;
    py::object make;
  };
  struct Bound;  // one call
  struct Losses {
    bool finite;
    double total;
  };

  Bound bind(const py::list& tensors, const py::object& weights) const;
  Call call(const Bound& bound, int threads) const;
  Losses look(const Bound& bound) const;
  py::object total(double value) const;
  void require_external(int external) const;

  const std::shared_ptr<const Program> program_;
  const int64_t tasks_, steps_, every_;
  std::vector<External> externals_;
  std::vector<Given> given_;
  std::vector<Room> rooms_;
  std::vector<Wanted> wanted_;
  const py::object total_;  // makes room for one number, or None
};

// A replay from Python, which signals interrupt; what it gives, for Python.
Outcome run_call(const Program& program, const Call& call);
py::tuple to_tuple(const Outcome& outcome);  // status, task, step, section, instruction

}  // namespace metafast
