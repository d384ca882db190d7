// Replaying a Program over tasks and steps.
//
// Tasks 0..T-1 are cut into contiguous groups: min(T, 16) of them, up to 64 where tasks are long beside sums, down to 8
// where sums are large beside tasks. A group's tasks run in order, on one worker, into one set of accumulators; the
// groups' accumulators are summed in a fixed tree. So nothing depends on the number of threads. Where several programs
// share the tasks (blocks of many lanes, and the rest one by one), those of the first come first; a block is one task
// here. Where groups are fewer than threads, several threads share a group: instructions are split by output range.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "program.hpp"

namespace metafast {

inline constexpr int64_t kMaxGroups = 64;

struct External {  // of task t, step k: pointer + t * task_stride + k * step_stride, in bytes
  int64_t pointer, task_stride, step_stride;
};

struct Sum {  // some of the accumulators, of all tasks, and where they are wanted
  int64_t offset, bytes;
  void* into;
};

struct Portion {  // the tasks, or blocks of lanes, that one program does
  const Program* program;
  std::span<const External> externals;  // of the first of them, and how they go on
  int64_t tasks;
};

struct Call {
  std::span<const Portion> portions;         // of one dtype, and with the same accumulators
  int64_t steps = 0;                         // of every task, or the most any task makes
  const int64_t* steps_of = nullptr;         // (T,), each 0..steps; null: all make `steps`
  int64_t every = 1;                         // states are held of every so many steps, the rest made again
  const void* weights = nullptr;             // of the program's dtype, one a lane of every task; null: all 1
  std::span<const Sum> sums;                 // written where the status is 0
  int threads = 1;                           // the calling thread included
  const volatile int32_t* cancel = nullptr;  // polled before every section; not 0 stops the replay
  bool (*interrupted)() noexcept =
      nullptr;  // asked some ten times a second on the calling thread; true stops it
};

inline constexpr int kCancelled = -1;

// Where a replay stopped. Of several failures the one of the lowest task group is reported, whatever the
// threads did.
struct Outcome {
  int status = 0;                // 0 done, kCancelled, or what the kernel returned (kernels::Status)
  int64_t task = -1, step = -1;  // the task as its portion counts
  int section = -1, instruction = -1;
};

// Runs the programs. Throws, before anything has run,
// std::invalid_argument for a call that makes no sense and std::bad_alloc; allocates nothing once running.
// Calls from several threads run one after the other; one made from within `interrupted` (a signal handler)
// runs at once, on its thread alone. Subnormals count as zero while it runs.
Outcome replay(const Call& call);

struct InstructionTime {
  int64_t calls = 0;
  double seconds = 0;
};

using Times = std::array<std::vector<InstructionTime>, kSections>;

// The same on the calling thread alone, with the time of every instruction, by portion and section; a clock reading costs
// some 25 ns, so times of shorter instructions are upper bounds.
Outcome profile(const Call& call, std::vector<Times>& times);

int64_t arena_bytes();  // held by all workers between calls
void trim();            // gives that memory back

}  // namespace metafast
