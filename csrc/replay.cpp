#include "replay.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "accumulators.hpp"
#include "engine.hpp"
#include "float_mode.hpp"
#include "frame.hpp"

namespace metafast {
namespace {

using Clock = std::chrono::steady_clock;
using Times = std::array<std::vector<InstructionTime>, kSections>;

// Waking a sleeping thread costs its waker 10 µs, and it comes 15 µs later: what it could share is to be worth that.
constexpr double kShortestJob = 60000;  // nanoseconds, a guess that is rather high

// Whoever called waits at most this long to be asked whether the replay should stop. The clock is read once a guessed
// millisecond, so that a call which takes less reads none.
constexpr std::chrono::milliseconds kPatience{100};
constexpr double kTick = 1e6;  // nanoseconds

// Whether this thread is inside `Call::interrupted` of a replay, and so holds the engine.
thread_local bool asking = false;

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
  static bool share_setup(const Program& program, const Call& call);
  static std::byte* reserve_sums(const Program& program, Engine& engine, int groups);
  void run_group(int group, int worker) noexcept override;
  void poll() noexcept override { tick(kTick / 1000); }
  void tick(double nanoseconds) noexcept;
  void ask() noexcept;
  bool run_task(Group& group, int64_t t) noexcept;
  bool run_steps(Group& group, int64_t t, int64_t first, int64_t end, int64_t steps) noexcept;
  bool run_back(Group& group, int64_t t, int64_t steps) noexcept;
  bool run_section(Group& group, const Place& place) noexcept;
  int run_instruction(Group& group, const Instruction& instruction) noexcept;
  int run_timed(Group& group, const Instruction& instruction, InstructionTime& time) noexcept;
  bool stopped(Group& group, const Place& place, double nanoseconds) noexcept;
  void record(const Group& group, const Place& place, int instruction, int status) noexcept;

  const Program& program_;
  const Call& call_;
  Engine& engine_;
  Times* const times_;
  const Layout layout_;
  const int groups_;
  const int workers_;
  const bool shares_setup_;                  // whether a worker's state slot 0 serves for all its tasks
  std::array<bool, kMostThreads> set_up_{};  // by worker, each of which looks at its own
  AccumulatorTree sums_;
  const FlushSubnormals* flush_ = nullptr;  // while it runs; on the calling thread, as are the next two
  double since_tick_ = 0;                   // nanoseconds, a guess
  Clock::time_point ask_at_{};              // the next time; not yet known at first
  std::atomic<bool> interrupted_{false};
  std::atomic<int> failed_group_{static_cast<int>(kMaxGroups)};  // the lowest
  std::array<Outcome, kMaxGroups> outcomes_;
};

int Replay::count_workers(const Program& program, const Call& call, int groups) {
  const double shared = groups > 1 ? program.nanoseconds(call.tasks, call.steps)
                                   : program.split_nanoseconds(call.tasks, call.steps);
  if (shared < kShortestJob) return 1;
  return program.splits() ? call.threads : std::clamp(groups, 1, call.threads);
}

bool Replay::share_setup(const Program& program, const Call& call) {
  return std::ranges::all_of(program.setup_externals(),
                             [&](int j) { return call.externals[j].task_stride == 0; });
}

std::byte* Replay::reserve_sums(const Program& program, Engine& engine, int groups) {
  return engine.accumulators.reserve(AccumulatorTree::bytes_needed(groups, program.sizes().accumulator));
}

Replay::Replay(const Program& program, const Call& call, Engine& engine, Times* times)
    : program_(program),
      call_(call),
      engine_(engine),
      times_(times),
      layout_(program, call.steps, call.every),
      groups_(static_cast<int>(std::min(call.tasks, kMaxGroups))),
      workers_(times ? 1 : count_workers(program, call, groups_)),
      shares_setup_(share_setup(program, call)),
      sums_(reserve_sums(program, engine, groups_), groups_, program.sizes().accumulator, program.dtype()) {
  if (engine.arenas.size() < static_cast<size_t>(workers_)) engine.arenas.resize(workers_);
  for (int w = 0; w < workers_; ++w) engine.arenas[w].reserve(w < groups_ ? layout_.bytes : layout_.helping);
}

Outcome Replay::run() {
  {
    const FlushSubnormals flush;
    flush_ = &flush;
    engine_.run(*this, groups_, workers_, program_.splits());
  }
  const int failed = failed_group_.load();
  if (failed < groups_) return outcomes_[failed];
  for (const Sum& sum : call_.sums) {
    auto* const into = static_cast<std::byte*>(sum.into);
    if (groups_)
      std::copy_n(sums_.root() + sum.offset, sum.bytes, into);
    else
      std::fill_n(into, sum.bytes, std::byte{0});
  }
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
  return run_steps(group, t, 0, steps, steps) && run_section(group, {kQuery, t, steps, steps}) &&
         run_back(group, t, steps) && run_section(group, {kEpilogue, t, 0, steps});
}

bool Replay::run_steps(Group& group, int64_t t, int64_t first, int64_t end, int64_t steps) noexcept {
  for (int64_t k = first; k < end; ++k)
    if (!run_section(group, {kInner, t, k, steps})) return false;
  return true;
}

// Segment by segment. The last one's states are there; those of an earlier one are made again from the first, which
// has a slot of its own, as has the one behind the segment, with what the last step kept.
bool Replay::run_back(Group& group, int64_t t, int64_t steps) noexcept {
  if (program_.section(kMeta).instructions.empty()) return true;
  for (int64_t end = steps, first; end > 0; end = first) {
    first = (end - 1) / layout_.every * layout_.every;
    if (end < steps && !run_steps(group, t, first, end - 1, steps)) return false;
    for (int64_t k = end; k-- > first; ++group.adjoints)
      if (!run_section(group, {kMeta, t, k, steps})) return false;
  }
  return true;
}

bool Replay::run_section(Group& group, const Place& place) noexcept {
  const SectionCode& code = program_.section(place.section);
  const auto& instructions = code.instructions;
  if (instructions.empty()) return true;
  if (stopped(group, place, code.nanoseconds)) return false;
  group.frame.write_record(place.task, place.step, place.steps);
  group.frame.move_to(place.section, place.task, place.step, group.adjoints);
  const bool slow = code.nanoseconds > kTick, set_up = place.section == kPrologue && set_up_[group.worker];
  for (size_t n = 0; n < instructions.size(); ++n) {
    if (set_up && instructions[n].sets_up) continue;
    if (slow && stopped(group, place, code.info[n].nanoseconds)) return false;
    const int status = times_ ? run_timed(group, instructions[n], (*times_)[place.section][n])
                              : run_instruction(group, instructions[n]);
    if (status) [[unlikely]] {
      record(group, place, static_cast<int>(n), status);
      return false;
    }
  }
  if (place.section == kPrologue) set_up_[group.worker] = shares_setup_;
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

// On the calling thread, before what may take that long.
void Replay::tick(double nanoseconds) noexcept {
  if ((since_tick_ += nanoseconds) < kTick) return;
  since_tick_ = 0;
  if (!call_.interrupted) return;
  const Clock::time_point now = Clock::now();
  if (ask_at_ != Clock::time_point{} && now >= ask_at_) ask();
  if (ask_at_ == Clock::time_point{} || now >= ask_at_) ask_at_ = Clock::now() + kPatience;
}

void Replay::ask() noexcept {
  asking = true;
  if (flush_->lifted(call_.interrupted)) interrupted_.store(true, std::memory_order_relaxed);
  asking = false;
}

// Whether this group ends here, before what may take `nanoseconds`: the call was cancelled or interrupted, or a group
// before this one failed and its outcome counts.
bool Replay::stopped(Group& group, const Place& place, double nanoseconds) noexcept {
  if (group.worker == 0) tick(nanoseconds);
  if (interrupted_.load(std::memory_order_relaxed) || (call_.cancel && *call_.cancel)) {
    record(group, place, -1, kCancelled);
    return true;
  }
  return failed_group_.load(std::memory_order_relaxed) < group.index;
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

constexpr int64_t kMostCount = int64_t{1} << 40;

void check_count(int64_t count, const char* what) {
  check(count >= 0 && count <= kMostCount, std::string(what) + ": at " +
                                               (count < 0 ? "least 0" : "most 2^40") + " expected, got " +
                                               std::to_string(count));
}

// Whether no task and step takes the address beyond what a pointer holds.
bool reaches(const External& external, const Call& call) {
  int64_t by_task, by_step;
  return !__builtin_mul_overflow(external.task_stride, call.tasks * 4, &by_task) &&
         !__builtin_mul_overflow(external.step_stride, (call.steps + 1) * 4, &by_step);
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
  if (!reaches(external, call)) check(false, name() + "strides beyond all memory");
  if (use.written && external.task_stride == 0 && call.tasks > 1)
    check(false, name() + "every task writes to the same place; give it a task stride, or use accumulators");
}

void check_call(const Program& program, const Call& call) {
  check(static_cast<int>(call.externals.size()) == program.n_external(),
        std::to_string(program.n_external()) + " externals expected, got " +
            std::to_string(call.externals.size()));
  check_count(call.tasks, "tasks");
  check_count(call.steps, "steps");
  const int64_t most = std::max<int64_t>(call.steps, 1);
  check(call.every >= 1 && call.every <= most,
        "every: 1 to " + std::to_string(most) + " expected, got " + std::to_string(call.every));
  check(call.threads >= 1 && call.threads <= kMostThreads,
        "threads: 1 to " + std::to_string(kMostThreads) + " expected, got " + std::to_string(call.threads));
  check(!call.steps_of || program.lanes() == 1, "steps of each task: a program of one lane expected");
  for (int64_t t = 0; call.steps_of && t < call.tasks; ++t)
    if (call.steps_of[t] < 0 || call.steps_of[t] > call.steps)
      check(false, "steps of task " + std::to_string(t) + ": 0 to " + std::to_string(call.steps) +
                       " expected, got " + std::to_string(call.steps_of[t]));
  for (const Sum& sum : call.sums)
    check(sum.offset >= 0 && sum.bytes >= 0 && sum.offset <= program.sizes().accumulator - sum.bytes,
          "sums: within the " + std::to_string(program.sizes().accumulator) + " bytes expected, got " +
              std::to_string(sum.bytes) + " from " + std::to_string(sum.offset));
  for (int j = 0; j < program.n_external(); ++j) check_external(program, call, j);
}

using Lock = std::unique_lock<std::timed_mutex>;

// The engine, as soon as it is free; not held where the call is interrupted before.
Lock hold(Engine& engine, const Call& call) {
  Lock lock(engine.mutex, std::try_to_lock);
  // By the clock of the day: ThreadSanitizer does not see locks taken by the steady one.
  while (!lock && !lock.try_lock_until(std::chrono::system_clock::now() + kPatience))
    if (call.interrupted && call.interrupted()) break;
  return lock;
}

// What `asking` is inside of holds it.
Lock hold(Engine& engine) { return asking ? Lock(engine.mutex, std::defer_lock) : Lock(engine.mutex); }

// A call made while this thread is asked whether another should stop: that one keeps the engine and its memory.
Outcome start_within(const Program& program, Call call, Times* times) {
  call.threads = 1;
  const auto engine = std::make_unique<Engine>();
  asking = false;
  const Outcome outcome = Replay(program, call, *engine, times).run();
  asking = true;
  return outcome;
}

Outcome start(const Program& program, const Call& call, Times* times) {
  check_call(program, call);
  if (asking) return start_within(program, call, times);
  Engine& engine = Engine::current();
  const Lock lock = hold(engine, call);
  if (!lock) return {.status = kCancelled};
  return Replay(program, call, engine, times).run();
}

}  // namespace

Outcome replay(const Program& program, const Call& call) { return start(program, call, nullptr); }

Outcome profile(const Program& program, const Call& call, Times& times) {
  for (int s = 0; s < kSections; ++s) times[s].resize(program.section(s).instructions.size());
  return start(program, call, &times);
}

int64_t arena_bytes() {
  Engine& engine = Engine::current();
  const Lock lock = hold(engine);
  int64_t bytes = engine.accumulators.bytes();
  for (const Buffer& arena : engine.arenas) bytes += arena.bytes();
  return bytes;
}

void trim() {
  if (asking) return;  // the memory is in use
  Engine& engine = Engine::current();
  const Lock lock = hold(engine);
  engine.accumulators.release();
  for (Buffer& arena : engine.arenas) arena.release();
}

}  // namespace metafast
