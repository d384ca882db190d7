// A Program: what is run for one task, as flat lists of kernel calls in five sections. Immutable; shared by
// threads.
//
//   task t:  prologue(k=0) ; for k < K: inner(k) ; query(k=K) ; for k = K-1..0: meta(k) ; epilogue(k=0)
//
// State slot 0 is laid out once for all tasks of a worker, where what makes it is the same for all of them. So is what a
// kernel makes of an external first (a product packs its right factor), where nothing writes to that.
//
// An operand is a space and a byte offset in it; where a space lies is known when the program is replayed:
//
//   space            what it is                                                        may be used in
//   0 arena          this worker's buffer; keeps its contents for the task             every section
//   1 state_cur      state slot k                                                      every section
//   2 state_next     state slot k+1                                                    inner, meta
//   3 adjoint_cur    adjoints of the state: query writes it, epilogue reads it         query, meta, epilogue
//   4 adjoint_next   meta reads adjoint_cur, writes this one; swapped after each step, meta
//                    if anything lies there
//   5 accumulator    sums over the tasks of a group, zeroed at its start               every section
//   6 constant       bytes the program carries; read only                              every section
//   7 call           [k, K, weight of the task] in the program's dtype; read only      every section
//   8 chunk          memory of one chunk of `chunks`                                   members of `chunks`
//   9+j external j   pointer_j + t * task_stride_j + k * step_stride_j                 every section
//
// Where not every state is held (Call::every), inner runs a second time for some steps, between those of meta: what it
// reads must be as it was the first time, and what it writes besides the state it must not add to.
//
// The kernel `chunks` (chunks.hpp) stands for instructions of its own, its members, and has no operands but theirs. Ints:
// how many chunks, bytes of memory for each. An operand of a member moves by its `stride` from chunk to chunk.
//
// A program of more than one lane does so many tasks at once, interleaved: t counts blocks of them, and the call's
// record holds the weight of every lane.
//
// Every space starts on a multiple of 64 bytes, externals excepted (these need the alignment of their
// element).
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "chunks.hpp"
#include "kernels/common/kernels.hpp"
#include "memory.hpp"
#include "signature.hpp"

namespace metafast {

enum Section : int { kPrologue, kInner, kQuery, kMeta, kEpilogue };
inline constexpr int kSections = 5;
inline constexpr std::array<std::string_view, kSections> kSectionNames = {"prologue", "inner", "query",
                                                                          "meta", "epilogue"};

enum Space : int {
  kArena,
  kStateCur,
  kStateNext,
  kAdjointCur,
  kAdjointNext,
  kAccumulator,
  kConstant,
  kCall,
  kChunk,
  kExternal
};
std::string space_name(int space);  // "arena", ..., "external 3"
// Whether its place changes from one task, step or group to the next.
constexpr bool moves(int space) {
  return space != kArena && space != kConstant && space != kCall && space != kChunk;
}

struct OperandSpec {
  int space;
  int64_t offset;      // bytes
  int64_t stride = 0;  // bytes from chunk to chunk, of a member of `chunks`
};

struct InstructionSpec {
  std::string kernel;
  std::vector<OperandSpec> operands;
  std::vector<int64_t> ints;
  std::vector<double> floats;
  std::vector<InstructionSpec> members{};  // of `chunks`
};

struct Sizes {  // bytes
  int64_t arena, state, adjoint, accumulator;
};

struct ProgramSpec {
  kernels::DType dtype;
  kernels::Isa isa;
  std::array<std::vector<InstructionSpec>, kSections> sections;
  Sizes sizes;
  std::string constants;
  int n_external;
  int lanes = 1;  // tasks done at once
};

struct Operand {
  int space;
  int slot;  // its place in the table of pointers
  int64_t offset;
};

struct Instruction {
  kernels::Run run;
  const int64_t* ints;
  const double* floats;
  const std::byte* prepared;  // what the kernel made of ints and floats, or null
  int first_operand;          // its pointers stand from here on in the table of pointers
  int most_parts;             // into how many parts it may be split with profit; 1: not at all
  bool sets_up = false;       // of the prologue: does the same for every task, if its externals are the same
  int kept = -1;              // among Program::kept(), or none
};

// What an instruction makes of an external that need be made once only where that is the same for all tasks and steps.
struct Kept {
  kernels::Keep make;
  kernels::Keeping what;
  OperandSpec source;
  int64_t offset;  // in a worker's memory for such things
  int external() const { return source.space - kExternal; }
};

// What dump, error messages and profiles need of an instruction, kept apart from what replay reads.
struct InstructionInfo {
  const kernels::Kernel* kernel;
  int n_operands, n_ints, n_floats;
  double nanoseconds;
};

struct SectionCode {
  std::vector<Instruction> instructions;
  std::vector<InstructionInfo> info;
  std::vector<Operand> moving;  // its operands in spaces that move
  std::vector<int> externals;   // the externals among them
  double nanoseconds = 0;       // guess for one pass on one thread
  double split = 0;             // of it in instructions that may be split
};

struct ExternalUse {
  int element = 1;  // bytes of its largest element: what its address and strides are multiples of
  bool touched = false, written = false;
};

class Program {
 public:
  // Throws std::invalid_argument naming section, instruction, kernel, what was expected and what was got: an
  // unknown kernel, wrong counts, a space the section may not use, an operand that leaves its space, is
  // misaligned for its element, or writes to a read-only one.
  explicit Program(ProgramSpec spec);
  Program(const Program&) = delete;  // instructions point into it
  Program& operator=(const Program&) = delete;

  kernels::DType dtype() const { return dtype_; }
  kernels::Isa isa() const { return isa_; }
  const Sizes& sizes() const { return sizes_; }
  int n_external() const { return n_external_; }
  int lanes() const { return lanes_; }
  int64_t record_bytes() const { return (2 + lanes_) * size_of(dtype_); }
  int64_t constant_bytes() const { return constant_bytes_; }
  int64_t scratch_bytes() const { return scratch_bytes_; }
  std::span<const Kept> kept() const { return kept_; }
  int64_t kept_bytes() const { return kept_bytes_; }
  const SectionCode& section(int s) const { return sections_[s]; }
  std::span<const Operand> operands() const { return operands_; }  // of all instructions, in order of `slot`
  const std::byte* constants() const { return constants_.data(); }
  const ExternalUse& external(int j) const { return externals_[j]; }
  bool splits() const;
  // The externals that instructions which set up state slot 0 read; where no task has its own of these, a worker need
  // run those instructions for its first task only.
  std::span<const int> setup_externals() const { return setup_externals_; }
  // Forward-only programs never come back to a state: two slots serve any number of steps.
  bool rolls_state() const;
  // Whether any operand lies there. Where none lies in state_next or adjoint_next, what a step hands on lies where it was.
  bool uses(Space space) const { return used_[space]; }
  double nanoseconds(int64_t tasks, int64_t steps) const;        // guess for one thread
  double split_nanoseconds(int64_t tasks, int64_t steps) const;  // of it in instructions that may be split

  std::string dump() const;     // a listing, one line an instruction
  std::string summary() const;  // one line

 private:
  double guess(double SectionCode::* part, int64_t tasks, int64_t steps) const;
  void add_section(int s, const std::vector<InstructionSpec>& specs);
  void add_instruction(int s, const InstructionSpec& spec);
  void add_chunks(int s, const InstructionSpec& spec);
  struct Call {  // of a kernel, as `chunks` and sections hold it
    Chunks::Member kernel;
    Signature signature;
    int first_operand;
    int64_t scratch;
  };
  // `memory`: of a chunk; -1 outside `chunks`.
  Call add_call(int s, const InstructionSpec& spec, int64_t chunks, int64_t memory);
  void add_operand(int s, const OperandSpec& spec, const Access& access, size_t index, int64_t chunks,
                   int64_t memory);
  void find_setup();
  void find_kept();
  int keep(const Kept& wanted);
  int64_t bytes_of(int space, int64_t memory) const;  // -1: unknown

  kernels::DType dtype_;
  kernels::Isa isa_;
  Sizes sizes_;
  int n_external_;
  int lanes_;
  int64_t constant_bytes_;
  int64_t scratch_bytes_ = 0, kept_bytes_ = 0;
  Buffer constants_;
  std::vector<int64_t> ints_;
  std::vector<double> floats_;
  std::vector<Buffer> prepared_;  // one an instruction whose kernel prepares; each stays where it is
  std::deque<Chunks> chunks_;
  std::vector<Operand> operands_;
  std::vector<bool> writes_;  // by slot, whether the operand is written
  std::array<bool, kExternal> used_{};
  std::vector<ExternalUse> externals_;
  std::vector<int> setup_externals_;
  std::vector<Kept> kept_;
  std::array<SectionCode, kSections> sections_;
};

}  // namespace metafast
