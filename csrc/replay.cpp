#include "replay.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "accumulators.hpp"
#include "float_mode.hpp"
#include "frame.hpp"
#include "memory.hpp"
#include "team.hpp"
#include "thread_pool.hpp"

namespace metafast {
namespace {

using Times = std::array<std::vector<InstructionTime>, kSections>;

// Waking a sleeping thread costs some 10 µs: shorter jobs run on the calling thread.
constexpr double kShortestJob = 15000;  // nanoseconds
constexpr int kMostThreads = 256;

// What outlives a call: threads and memory. One for the process, never destroyed (its threads may be asleep
// in it).
struct Engine {
  std::mutex mutex;
  ThreadPool pool;
  std::vector<Buffer> arenas;  // one a worker
  Buffer accumulators;
};

std::atomic<Engine*> current_engine{nullptr};

// In a forked child the threads are gone and the mutex may be held by one of them: it starts anew.
void forget_engine() { current_engine.store(nullptr); }

Engine& engine() {
  [[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, forget_engine);
  if (Engine* const present = current_engine.load()) return *present;
  auto fresh = std::make_unique<Engine>();
  Engine* expected = nullptr;
  return current_engine.compare_exchange_strong(expected, fresh.get()) ? *fresh.release() : *expected;
}

// One worker's place in the work on a group: by itself (no team), or as a member of a team.
struct Seat {
  Frame& frame;
  int group;
  Team* team = nullptr;
  int member = 0;
  std::byte* accumulators = nullptr;
  int64_t barriers = 0;  // met so far
  int64_t adjoints = 0;  // exchanges of the adjoint slots so far in this task

  bool leads() const { return member == 0; }
  bool meet() { return team->meet(barriers++); }
};

struct Place {
  int section;
  int64_t task, step, steps;
};

class Replay {
 public:
  Replay(const Program& program, const Call& call, Engine& engine, Times* times);
  Outcome run();

 private:
  static int count_workers(const Program& program, const Call& call, int groups);
  void work(int worker) noexcept;
  void work_in_team(int worker) noexcept;
  int first_of_team(int team) const { return (team * workers_ + groups_ - whole_ - 1) / (groups_ - whole_); }
  void run_group(Seat seat) noexcept;
  bool begin_group(Seat& seat) noexcept;
  bool run_tasks(Seat& seat) noexcept;
  bool run_task(Seat& seat, int64_t t) noexcept;
  bool run_section(Seat& seat, const Place& place) noexcept;
  bool run_alone(Seat& seat, const Place& place) noexcept;
  bool run_timed(Seat& seat, const Place& place) noexcept;
  bool run_shared(Seat& seat, const Place& place) noexcept;
  bool stopped(Seat& seat, const Place& place) noexcept;
  void record(Seat& seat, const Place& place, int instruction, int status) noexcept;
  static bool leave(Seat& seat) noexcept;
  Frame frame(int worker, int leader) noexcept;

  const Program& program_;
  const Call& call_;
  Engine& engine_;
  Times* const times_;
  const Layout layout_;
  const int groups_;
  const int workers_;
  const int whole_;  // groups that one worker each runs; the rest, fewer than the workers, are run by teams
  std::optional<AccumulatorTree> sums_;
  std::atomic<int> next_group_{0};
  std::atomic<int> failed_group_{static_cast<int>(kMaxGroups)};
  std::array<Outcome, kMaxGroups> outcomes_;
  std::array<Team, kMaxGroups> teams_;
};

int Replay::count_workers(const Program& program, const Call& call, int groups) {
  if (program.nanoseconds(call.tasks, call.steps) < kShortestJob) return 1;
  return program.splits() ? call.threads : std::min(call.threads, std::max(groups, 1));
}

Replay::Replay(const Program& program, const Call& call, Engine& engine, Times* times)
    : program_(program),
      call_(call),
      engine_(engine),
      times_(times),
      layout_(program, call.steps),
      groups_(static_cast<int>(std::min(call.tasks, kMaxGroups))),
      workers_(times ? 1 : count_workers(program, call, groups_)),
      whole_(program.splits() ? groups_ - groups_ % workers_ : groups_) {
  if (engine.arenas.size() < static_cast<size_t>(workers_)) engine.arenas.resize(workers_);
  for (int w = 0; w < workers_; ++w) engine.arenas[w].reserve(layout_.bytes);
  const int64_t bytes = program.sizes().accumulator;
  sums_.emplace(engine.accumulators.reserve(AccumulatorTree::bytes_needed(groups_, bytes)), groups_, bytes,
                program.dtype());
  for (int team = 0; team < groups_ - whole_; ++team)
    teams_[team].set_members(first_of_team(team + 1) - first_of_team(team));
}

Outcome Replay::run() {
  engine_.pool.run(
      workers_, [](void* self, int worker) noexcept { static_cast<Replay*>(self)->work(worker); }, this);
  const int failed = failed_group_.load();
  if (failed < groups_) return outcomes_[failed];
  const auto bytes = static_cast<size_t>(program_.sizes().accumulator);
  if (call_.result && bytes) {
    if (groups_)
      std::copy_n(sums_->root(), bytes, static_cast<std::byte*>(call_.result));
    else
      std::fill_n(static_cast<std::byte*>(call_.result), bytes, std::byte{0});
  }
  return {};
}

Frame Replay::frame(int worker, int leader) noexcept {
  return Frame(program_, call_, layout_, engine_.arenas[worker].data(), engine_.arenas[leader].data());
}

void Replay::work(int worker) noexcept {
  const FlushSubnormals flush;
  Frame own = frame(worker, worker);
  for (int g; (g = next_group_.fetch_add(1, std::memory_order_relaxed)) < whole_;) run_group({own, g});
  if (whole_ < groups_) work_in_team(worker);
}

// The groups left over are dealt to the workers in order, as evenly as they go.
void Replay::work_in_team(int worker) noexcept {
  const int n = worker * (groups_ - whole_) / workers_, leader = first_of_team(n);
  Frame own = frame(worker, leader);
  if (teams_[n].members() == 1) return run_group({own, whole_ + n});
  run_group({own, whole_ + n, &teams_[n], worker - leader});
}

void Replay::run_group(Seat seat) noexcept {
  if (!begin_group(seat) || !run_tasks(seat)) return;
  if (seat.team && !seat.meet()) return;
  if (seat.leads()) sums_->finish(seat.group, seat.accumulators);
}

bool Replay::begin_group(Seat& seat) noexcept {
  if (seat.leads()) seat.accumulators = sums_->acquire();
  if (seat.team) {
    if (seat.leads()) seat.team->accumulators = seat.accumulators;
    if (!seat.meet()) return false;
    seat.accumulators = seat.team->accumulators;
  }
  seat.frame.begin_group(seat.accumulators);
  return true;
}

bool Replay::run_tasks(Seat& seat) noexcept {
  const int64_t end = (seat.group + 1) * call_.tasks / groups_;
  for (int64_t t = seat.group * call_.tasks / groups_; t < end; ++t)
    if (!run_task(seat, t)) return false;
  return true;
}

bool Replay::run_task(Seat& seat, int64_t t) noexcept {
  const int64_t steps = call_.steps_of ? call_.steps_of[t] : call_.steps;
  seat.adjoints = 0;
  if (!run_section(seat, {kPrologue, t, 0, steps})) return false;
  for (int64_t k = 0; k < steps; ++k)
    if (!run_section(seat, {kInner, t, k, steps})) return false;
  if (!run_section(seat, {kQuery, t, steps, steps})) return false;
  for (int64_t k = steps; k-- > 0; ++seat.adjoints)
    if (!run_section(seat, {kMeta, t, k, steps})) return false;
  return run_section(seat, {kEpilogue, t, 0, steps});
}

bool Replay::run_section(Seat& seat, const Place& place) noexcept {
  const SectionCode& code = program_.section(place.section);
  if (code.instructions.empty()) return true;
  if (seat.leads()) {
    if (stopped(seat, place)) return false;
    seat.frame.write_record(place.task, place.step, place.steps);
  } else if (!code.splits) {
    return true;  // the leader's alone
  }
  seat.frame.move_to(place.section, place.task, place.step, seat.adjoints);
  if (times_) return run_timed(seat, place);
  return seat.team ? run_shared(seat, place) : run_alone(seat, place);
}

bool Replay::run_alone(Seat& seat, const Place& place) noexcept {
  const auto& instructions = program_.section(place.section).instructions;
  for (const Instruction& instruction : instructions)
    if (const int status = seat.frame.run(instruction, 0, 1)) [[unlikely]] {
      record(seat, place, static_cast<int>(&instruction - instructions.data()), status);
      return false;
    }
  return true;
}

bool Replay::run_timed(Seat& seat, const Place& place) noexcept {
  using Clock = std::chrono::steady_clock;
  const auto& instructions = program_.section(place.section).instructions;
  for (size_t n = 0; n < instructions.size(); ++n) {
    const auto start = Clock::now();
    const int status = seat.frame.run(instructions[n], 0, 1);
    InstructionTime& time = (*times_)[place.section][n];
    time.seconds += std::chrono::duration<double>(Clock::now() - start).count();
    ++time.calls;
    if (status) {
      record(seat, place, static_cast<int>(n), status);
      return false;
    }
  }
  return true;
}

// Every member walks the same list, so all agree on where the barriers are: after an instruction that is
// split, and before one where the leader has done something since the last barrier (an instruction, or the
// record of the call).
bool Replay::run_shared(Seat& seat, const Place& place) noexcept {
  const auto& instructions = program_.section(place.section).instructions;
  const int members = seat.team->members();
  bool leader_ahead = true;
  for (size_t n = 0; n < instructions.size(); ++n) {
    const int parts = std::min(instructions[n].most_parts, members);
    if (parts > 1 && leader_ahead && !seat.meet()) return false;
    leader_ahead = parts == 1;
    const int status = seat.member < parts ? seat.frame.run(instructions[n], seat.member, parts) : 0;
    if (status) record(seat, place, static_cast<int>(n), status);
    if (parts > 1 && !seat.meet()) return false;
    if (parts == 1 && status) return leave(seat);
  }
  return true;
}

// Whether this group ends here: the call was cancelled, or a group before this one failed and its outcome
// counts.
bool Replay::stopped(Seat& seat, const Place& place) noexcept {
  const bool cancelled = call_.cancel && *call_.cancel;
  if (!cancelled && failed_group_.load(std::memory_order_relaxed) > seat.group) return false;
  if (cancelled) record(seat, place, -1, kCancelled);
  leave(seat);
  return true;
}

// Notes where the group failed; of members failing at once the first one counts (they were in the same
// instruction).
void Replay::record(Seat& seat, const Place& place, int instruction, int status) noexcept {
  if (seat.team && !seat.team->fail(seat.barriers)) return;
  outcomes_[seat.group] = {status, place.task, place.step, place.section, instruction};
  int lowest = failed_group_.load();
  while (seat.group < lowest && !failed_group_.compare_exchange_weak(lowest, seat.group)) {
  }
}

// The leader of a team gives up: the others wait for it at the next barrier and leave there too.
bool Replay::leave(Seat& seat) noexcept {
  if (seat.team) {
    seat.team->fail(seat.barriers);
    seat.meet();
  }
  return false;
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
  Engine& present = engine();
  const std::lock_guard lock(present.mutex);
  Replay replay(program, call, present, times);
  return replay.run();
}

}  // namespace

Outcome replay(const Program& program, const Call& call) { return start(program, call, nullptr); }

Outcome profile(const Program& program, const Call& call, Times& times) {
  for (int s = 0; s < kSections; ++s) times[s].resize(program.section(s).instructions.size());
  return start(program, call, &times);
}

int64_t arena_bytes() {
  Engine& present = engine();
  const std::lock_guard lock(present.mutex);
  int64_t bytes = present.accumulators.bytes();
  for (const Buffer& arena : present.arenas) bytes += arena.bytes();
  return bytes;
}

void trim() {
  Engine& present = engine();
  const std::lock_guard lock(present.mutex);
  present.accumulators.release();
  for (Buffer& arena : present.arenas) arena.release();
}

}  // namespace metafast
