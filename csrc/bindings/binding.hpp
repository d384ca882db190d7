// What one call does between Python's tensors and the replay: read addresses, make room, run, look at the losses.
#pragma once
#include <optional>
#include <span>
#include <vector>

#include "program.hpp"
#include "python.hpp"
#include "replay.hpp"
#include "tensors.hpp"

namespace metafast {

class Binding {
 public:
  // As in metafast/_C.pyi.
  Binding(const py::list& portions, int64_t steps, const py::list& given, const py::list& rooms,
          const py::list& sums, bool total, int64_t every);

  py::object run(const py::list& tensors, const py::object& weights, int64_t divisor, int threads,
                 bool losses) const;
  // The total and a tuple of the sums; None where a tensor cannot be read where it lies, the replay failed, or a loss is
  // not finite.
  py::object run_again(std::span<PyObject* const> tensors, const py::object& weights, int64_t divisor,
                       int threads) const;
  py::object profile(const py::list& tensors, const py::object& weights) const;

 private:
  struct
      External {  // one of a program's: where the first task's lies in one of the tensors, and how it goes on
    int64_t tensor, offset, task_stride, step_stride;
  };
  struct Own {  // what one program does: so many tasks, or blocks of its lanes
    std::shared_ptr<const Program> program;
    int64_t tasks;
    std::vector<External> externals;
  };
  struct Given {
    int tensor;
    py::object dtype;
    View::Type viewed;
    // Its address, if a kernel may read it there.
    std::optional<int64_t> where(const py::handle& tensor) const;
  };
  struct Room {
    py::object key;
    int tensor;
    Shape shape;
    bool zero;               // at first: tasks add to it
    int64_t looked, summed;  // how many elements, from the first on, are losses to be finite; are summed
  };
  struct Wanted {
    py::object key;
    int64_t offset;
    Shape shape;
  };
  struct Bound;  // one call
  struct Losses {
    bool finite;
    double total;
  };

  Bound bind(std::span<PyObject* const> tensors, const py::object& weights) const;
  Call call(const Bound& bound, int threads) const;
  Losses look(const Bound& bound) const;
  py::dict rooms(Bound& bound, bool losses) const;
  py::dict sums(Bound& bound) const;
  py::object total(double value) const;
  Shape shape(const py::handle& sizes, const py::handle& strides) const;
  static py::list shown(const Program& program, const Times& times);
  kernels::DType dtype() const { return portions_.front().program->dtype(); }
  void add_portion(const py::handle& row);
  void require_tensor(int64_t tensor) const;

  const int64_t steps_, every_;
  int64_t tensors_;  // how many are given or made
  std::vector<Own> portions_;
  std::vector<Given> given_;
  std::vector<Room> rooms_;
  std::vector<Wanted> wanted_;
  const bool total_;
};

// A replay from Python, which signals interrupt; what it gives, for Python.
Outcome run_call(const Call& call);
py::tuple to_tuple(const Outcome& outcome);  // status, task, step, section, instruction

}  // namespace metafast
