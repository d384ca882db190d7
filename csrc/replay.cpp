#include "replay.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>

#include "accumulators.hpp"
#include "engine.hpp"
#include "float_mode.hpp"
#include "frame.hpp"

namespace metafast {
namespace {

using Times = std::array<std::vector<InstructionTime>, kSections>;

// Waking a sleeping thread costs some 10 µs: shorter jobs run on the calling thread.
constexpr double kShortestJob = 15000;  // nanoseconds
constexpr std::chrono::milliseconds kPatience{50};

struct Place {
  int section;
  int64_t task, step, steps;
};

// One call. Groups are run by whichever worker takes them, in an order that no result depends on.
class Replay final : GroupRunner {
 public:
  Replay(const Program& program, const Call& call, Engine& engine, Times* times);
  Outcome run();

 private:
  struct Group {  // one being run
    int index, worker;
    Frame frame;
    int64_t adjoints = 0;  // exchanges of the adjoint slots so far in this task
  };

  static int count_workers(const Program& program, const Call& call, int groups);
  static std::byte* reserve_sums(const Program& program, Engine& engine, int groups);
  void run_group(int group, int worker) noexcept override;
  bool run_task(Group& group, int64_t t) noexcept;
  bool run_section(Group& group, const Place& place) noexcept;
  int run_instruction(Group& group, const Instruction& instruction) noexcept;
  int run_timed(Group& group, const Instruction& instruction, InstructionTime& time) noexcept;
  bool stopped(Group& group, const Place& place) noexcept;
  bool interrupted(const Group& group) noexcept;
  void record(const Group& group, const Place& place, int instruction, int status) noexcept;

  const Program& program_;
  const Call& call_;
  Engine& engine_;
  Times* const times_;
  const Layout layout_;
  const int groups_;
  const int workers_;
  AccumulatorTree sums_;
  std::atomic<int> failed_group_{static_cast<int>(kMaxGroups)};  // the lowest
  std::array<Outcome, kMaxGroups> outcomes_;
  std::atomic<bool> interrupted_{false};
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();  // the caller's own
};

int Replay::count_workers(const Program& program, const Call& call, int groups) {
  if (program.nanoseconds(call.tasks, call.steps) < kShortestJob) return 1;
  return program.splits() ? call.threads : std::clamp(groups, 1, call.threads);
}

std::byte* Replay::reserve_sums(const Program& program, Engine& engine, int groups) {
  return engine.accumulators.reserve(AccumulatorTree::bytes_needed(groups, program.sizes().accumulator));
}

Replay::Replay(const Program& program, const Call& call, Engine& engine, Times* times)
    : program_(program),
      call_(call),
      engine_(engine),
      times_(times),
      layout_(program, call.steps),
      groups_(static_cast<int>(std::min(call.tasks, kMaxGroups))),
      workers_(times ? 1 : count_workers(program, call, groups_)),
      sums_(reserve_sums(program, engine, groups_), groups_, program.sizes().accumulator, program.dtype()) {
  if (engine.arenas.size() < static_cast<size_t>(workers_)) engine.arenas.resize(workers_);
  for (int w = 0; w < workers_; ++w) engine.arenas[w].reserve(layout_.bytes);
}

Outcome Replay::run() {
  {
    const FlushSubnormals flush;
    engine_.run(*this, groups_, workers_, program_.splits());
  }
  const int failed = failed_group_.load();
  if (failed < groups_) return outcomes_[failed];
  if (call_.result == nullptr) return {};
  auto* const result = static_cast<std::byte*>(call_.result);
  if (groups_)
    std::copy_n(sums_.root(), program_.sizes().accumulator, result);
  else
    std::fill_n(result, program_.sizes().accumulator, std::byte{0});
  return {};
}

void Replay::run_group(int index, int worker) noexcept {
  Group group{index, worker, Frame(program_, call_, layout_, engine_.arenas[worker].data())};
  std::byte* const sums = sums_.acquire();
  group.frame.begin_group(sums);
  const int64_t end = (index + 1) * call_.tasks / groups_;
  for (int64_t t = index * call_.tasks / groups_; t < end; ++t)
    if (!run_task(group, t)) return;
  sums_.finish(index, sums);
}

bool Replay::run_task(Group& group, int64_t t) noexcept {
  const int64_t steps = call_.steps_of ? call_.steps_of[t] : call_.steps;
  group.adjoints = 0;
  if (!run_section(group, {kPrologue, t, 0, steps})) return false;
  for (int64_t k = 0; k < steps; ++k)
    if (!run_section(group, {kInner, t, k, steps})) return false;
  if (!run_section(group, {kQuery, t, steps, steps})) return false;
  for (int64_t k = steps; k-- > 0; ++group.adjoints)
    if (!run_section(group, {kMeta, t, k, steps})) return false;
  return run_section(group, {kEpilogue, t, 0, steps});
}

bool Replay::run_section(Group& group, const Place& place) noexcept {
  const auto& instructions = program_.section(place.section).instructions;
  if (instructions.empty()) return true;
  if (stopped(group, place)) return false;
  group.frame.write_record(place.task, place.step, place.steps);
  group.frame.move_to(place.section, place.task, place.step, group.adjoints);
  for (size_t n = 0; n < instructions.size(); ++n) {
    const int status = times_ ? run_timed(group, instructions[n], (*times_)[place.section][n])
                              : run_instruction(group, instructions[n]);
    if (status) [[unlikely]] {
      record(group, place, static_cast<int>(n), status);
      return false;
    }
  }
  return true;
}

int Replay::run_instruction(Group& group, const Instruction& instruction) noexcept {
  if (instruction.most_parts > 1)
    if (const int helpers = engine_.helpers(); helpers > 0)
      return engine_.run_in_parts(instruction, group.frame.operands(instruction), layout_.scratch,
                                  std::min(instruction.most_parts, helpers + 1), group.worker);
  return group.frame.run(instruction);
}

int Replay::run_timed(Group& group, const Instruction& instruction, InstructionTime& time) noexcept {
  const auto start = std::chrono::steady_clock::now();
  const int status = group.frame.run(instruction);
  time.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  ++time.calls;
  return status;
}

// Whether this group ends here: the call was cancelled, or a group before this one failed and its outcome
// counts.
bool Replay::stopped(Group& group, const Place& place) noexcept {
  if ((call_.cancel && *call_.cancel) || (call_.interrupted && interrupted(group))) {
    record(group, place, -1, kCancelled);
    return true;
  }
  return failed_group_.load(std::memory_order_relaxed) < group.index;
}

// Only worker 0 is the thread that called, and may ask; the others learn of it here.
bool Replay::interrupted(const Group& group) noexcept {
  if (group.worker == 0) {
    const auto now = std::chrono::steady_clock::now();
    if (now - asked_ >= kPatience) {
      asked_ = now;
      if (call_.interrupted()) interrupted_.store(true, std::memory_order_relaxed);
    }
  }
  return interrupted_.load(std::memory_order_relaxed);
}

void Replay::record(const Group& group, const Place& place, int instruction, int status) noexcept {
  outcomes_[group.index] = {status, place.task, place.step, place.section, instruction};
  int lowest = failed_group_.load();
  while (group.index < lowest && !failed_group_.compare_exchange_weak(lowest, group.index)) {
  }
}

void check(bool good, const std::string& message) {
  if (!good) throw std::invalid_argument("run: " + message);
}

void check_external(const Program& program, const Call& call, int j) {
  const ExternalUse& use = program.external(j);
  const External& external = call.externals[j];
  const auto name = [j] { return "external " + std::to_string(j) + ": "; };
  if (!use.touched || call.tasks == 0) return;
  if (external.pointer == 0) check(false, name() + "null pointer");
  if ((external.pointer | external.task_stride | external.step_stride) % use.element)
    check(false, name() + "pointer and strides must be multiples of the element's " +
                     std::to_string(use.element) + " bytes, got " + std::to_string(external.pointer) + ", " +
                     std::to_string(external.task_stride) + ", " + std::to_string(external.step_stride));
  if (use.written && external.task_stride == 0 && call.tasks > 1)
    check(false, name() + "every task writes to the same place; give it a task stride, or use accumulators");
}

void check_call(const Program& program, const Call& call) {
  check(static_cast<int>(call.externals.size()) == program.n_external(),
        std::to_string(program.n_external()) + " externals expected, got " +
            std::to_string(call.externals.size()));
  check(call.tasks >= 0, "tasks: at least 0 expected, got " + std::to_string(call.tasks));
  check(call.steps >= 0, "steps: at least 0 expected, got " + std::to_string(call.steps));
  check(call.threads >= 1 && call.threads <= kMostThreads,
        "threads: 1 to " + std::to_string(kMostThreads) + " expected, got " + std::to_string(call.threads));
  for (int64_t t = 0; call.steps_of && t < call.tasks; ++t)
    if (call.steps_of[t] < 0 || call.steps_of[t] > call.steps)
      check(false, "steps of task " + std::to_string(t) + ": 0 to " + std::to_string(call.steps) +
                       " expected, got " + std::to_string(call.steps_of[t]));
  for (int j = 0; j < program.n_external(); ++j) check_external(program, call, j);
}

Outcome start(const Program& program, const Call& call, Times* times) {
  check_call(program, call);
  Engine& engine = Engine::current();
  const std::lock_guard lock(engine.mutex);
  Replay replay(program, call, engine, times);
  return replay.run();
}

}  // namespace

Outcome replay(const Program& program, const Call& call) { return start(program, call, nullptr); }

Outcome profile(const Program& program, const Call& call, Times& times) {
  for (int s = 0; s < kSections; ++s) times[s].resize(program.section(s).instructions.size());
  return start(program, call, &times);
}

int64_t arena_bytes() {
  Engine& engine = Engine::current();
  const std::lock_guard lock(engine.mutex);
  int64_t bytes = engine.accumulators.bytes();
  for (const Buffer& arena : engine.arenas) bytes += arena.bytes();
  return bytes;
}

void trim() {
  Engine& engine = Engine::current();
  const std::lock_guard lock(engine.mutex);
  engine.accumulators.release();
  for (Buffer& arena : engine.arenas) arena.release();
}

}  // namespace metafast
