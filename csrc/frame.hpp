// What one worker holds while it runs tasks: the pointers of every operand, brought up to date from section
// to section.
#pragma once
#include <cstdint>

#include "program.hpp"
#include "replay.hpp"

namespace metafast {

// Where the parts of a worker's memory lie, in bytes from its start. States 0, n, 2n, ... have slots of their own, for
// n = `every`; those between two of them share n - 1 slots with those of every other segment. A program that never
// comes back to a state has two slots, or one where a step writes the next state over its own.
struct Layout {
  Layout(const Program& program, int64_t steps, int64_t every);
  int64_t slot(int64_t k) const noexcept {  // of state k
    if (rolls) return k % turns;
    if (every == 1) return k;  // without a division
    return k % every ? shared + k % every : k / every;
  }

  bool rolls;
  int64_t every, shared;  // slots that are not shared, less one
  int64_t turns;          // slots of a program that never comes back to a state
  int64_t table, bases, call, scratch, arena, kept, made, adjoint, state;
  int64_t state_stride, adjoint_stride;
  int64_t helping, bytes;  // all that running parts of instructions takes; all
};

// What one program does of a call, made ready.
struct Part {
  Part(const Call& call, const Portion& portion, int64_t first, int64_t lanes_before);
  const Program& program;
  std::span<const External> externals;
  const void* weights;  // of its first task, or null
  Layout layout;
  int64_t first, end;  // among the tasks of the call
  bool shares_setup;   // whether a worker's state slot 0 serves for all of them
};

class Frame {
 public:
  Frame(const Part& part, std::byte* memory) noexcept;

  void begin_group(std::byte* accumulators) noexcept { bases_[kAccumulator] = accumulators; }
  // Points every operand of section s at task t of the part, step k. `adjoints` counts the exchanges of the two adjoint
  // slots.
  void move_to(int s, int64_t t, int64_t k, int64_t adjoints) noexcept;
  void write_record(int64_t t, int64_t k, int64_t steps) noexcept;

  void* const* operands(const Instruction& instruction) const noexcept {
    return table_ + instruction.first_operand;
  }
  int run(const Instruction& instruction) const noexcept {
    return instruction.run({operands(instruction), instruction.ints, instruction.floats, scratch_, 0, 1,
                            instruction.prepared, instruction.kept < 0 ? nullptr : kept(instruction)});
  }
  // Before the first task of a call: another one's externals may have been kept here.
  void forget_kept() const noexcept;

 private:
  std::byte* kept(const Instruction& instruction) const noexcept;
  std::byte* state_slot(int64_t k) const noexcept;

  const Part& part_;
  std::byte* memory_;
  void** table_;
  std::byte** bases_;
  std::byte* scratch_;
};

}  // namespace metafast
