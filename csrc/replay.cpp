#include "replay.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "accumulators.hpp"
#include "engine.hpp"
#include "float_mode.hpp"
#include "frame.hpp"

namespace metafast {
namespace {

using Clock = std::chrono::steady_clock;

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

// Writes the sums over tasks where they are wanted: pieces that workers take as they take groups.
class SumWriter final : public GroupRunner {
 public:
  SumWriter(const AccumulatorTree& tree, std::span<const Sum> sums, int64_t bytes)
      : tree_(tree), sums_(sums), lines_((bytes + kAlignment - 1) / kAlignment) {}

  int pieces() const noexcept {
    return static_cast<int>(std::clamp<int64_t>(lines_ / kPiece, 1, kMostPieces));
  }
  void run_group(int piece, int) noexcept override {
    const int64_t first = start(piece), end = start(piece + 1);
    for (const Sum& sum : sums_) {
      const int64_t from = std::max(first, sum.offset), to = std::min(end, sum.offset + sum.bytes);
      if (from < to) tree_.write(from, to - from, static_cast<std::byte*>(sum.into) + (from - sum.offset));
    }
  }
  void poll() noexcept override {}

 private:
  static constexpr int64_t kPiece = 2048, kMostPieces = 64;  // lines: 128 KiB take 10 µs

  int64_t start(int piece) const noexcept { return piece * lines_ / pieces() * kAlignment; }

  const AccumulatorTree& tree_;
  const std::span<const Sum> sums_;
  const int64_t lines_;  // of all sums
};

// One call. Groups are run by whichever worker takes them, in an order that no result depends on.
class Replay final : GroupRunner {
 public:
  Replay(const Call& call, Engine& engine, std::vector<Times>* times);
  Outcome run();

 private:
  struct Group {  // one being run
    int index, worker, part;
    Frame frame;
    int64_t adjoints = 0;  // exchanges of the adjoint slots so far in this task
  };

  static std::vector<Part> parts_of(const Call& call);
  int count_groups() const;
  int count_workers() const;
  bool spares_caller() const;
  void write_sums();
  template <class Count>
  auto most(Count count) const;
  std::byte* reserve_sums() const;
  bool run_part(int part, int group, int worker, std::byte* sums, int64_t first, int64_t end) noexcept;
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

  const Call& call_;
  Engine& engine_;
  std::vector<Times>* const times_;
  const std::vector<Part> parts_;
  const int groups_;
  const bool splits_;
  const int workers_;
  // By worker, counted from 1: the part whose state slot 0 is laid out, and the part whose memory its arena holds.
  std::array<int, kMostThreads> set_up_{}, held_{};
  AccumulatorTree sums_;
  const FlushSubnormals* flush_ = nullptr;  // while it runs; on the calling thread, as are the next two
  double since_tick_ = 0;                   // nanoseconds, a guess
  Clock::time_point ask_at_{};              // the next time; not yet known at first
  std::atomic<bool> interrupted_{false};
  std::atomic<int> failed_group_{static_cast<int>(kMaxGroups)};  // the lowest
  std::array<Outcome, kMaxGroups> outcomes_;
};

std::vector<Part> Replay::parts_of(const Call& call) {
  std::vector<Part> parts;
  parts.reserve(call.portions.size());
  int64_t first = 0, lanes = 0;
  for (const Portion& portion : call.portions) {
    parts.emplace_back(call, portion, first, lanes);
    first += portion.tasks;
    lanes += portion.tasks * portion.program->lanes();
  }
  return parts;
}

// Of what each part counts.
template <class Count>
auto Replay::most(Count count) const {
  auto found = count(parts_.front());
  for (const Part& part : parts_) found = std::max(found, count(part));
  return found;
}

// The more groups, the more evenly threads share the tasks, and the more sums are cleared and added: more than a few
// where that is next to nothing beside the tasks themselves, and fewer where it is much of large sums. Threads play no
// part in it.
int Replay::count_groups() const {
  constexpr double kFewest = 8, kFew = 16, kNextToNothing = 0.01, kMuch = 0.05;
  constexpr double kLarge = 1 << 16, kGroup = 500, kBytesPerNanosecond = 3;
  double tasks = 0;
  for (const Part& part : parts_) tasks += part.program.nanoseconds(part.end - part.first, call_.steps);
  const auto bytes = static_cast<double>(parts_.front().program.sizes().accumulator);
  const double affordable = tasks / (kGroup + bytes / kBytesPerNanosecond);
  const double least = bytes < kLarge ? kFew : std::clamp(kMuch * affordable, kFewest, kFew);
  const auto groups =
      static_cast<int64_t>(std::clamp<double>(kNextToNothing * affordable, least, kMaxGroups));
  return static_cast<int>(std::min(parts_.back().end, groups));
}

int Replay::count_workers() const {
  double shared = 0;
  for (const Part& part : parts_)
    shared += groups_ > 1 ? part.program.nanoseconds(part.end - part.first, call_.steps)
                          : part.program.split_nanoseconds(part.end - part.first, call_.steps);
  if (shared < kShortestJob) return 1;
  return splits_ ? call_.threads : std::clamp(groups_, 1, call_.threads);
}

// Whether this thread leaves blocks of tasks that fill a second-level cache to others, where there is one for each: it
// runs Python between two calls, and that and they would find each other's memory there in place of their own.
bool Replay::spares_caller() const {
  constexpr int64_t kFilling = int64_t{1} << 18;
  const Part& blocks = parts_.front();
  return parts_.size() > 1 && blocks.end < workers_ && blocks.layout.bytes >= kFilling;
}

std::byte* Replay::reserve_sums() const {
  const int64_t bytes = parts_.front().program.sizes().accumulator;
  return engine_.accumulators.reserve(AccumulatorTree::bytes_needed(groups_, bytes));
}

Replay::Replay(const Call& call, Engine& engine, std::vector<Times>* times)
    : call_(call),
      engine_(engine),
      times_(times),
      parts_(parts_of(call)),
      groups_(count_groups()),
      splits_(most([](const Part& part) { return part.program.splits(); })),
      workers_(times ? 1 : count_workers()),
      sums_(reserve_sums(), groups_, parts_.front().program.sizes().accumulator,
            parts_.front().program.dtype()) {
  if (engine.arenas.size() < static_cast<size_t>(workers_)) engine.arenas.resize(workers_);
  const int64_t running = most([](const Part& part) { return part.layout.bytes; });
  const int64_t helping = most([](const Part& part) { return part.layout.helping; });
  for (int w = 0; w < workers_; ++w) engine.arenas[w].reserve(w < groups_ ? running : helping);
}

Outcome Replay::run() {
  {
    const FlushSubnormals flush;
    flush_ = &flush;
    engine_.run(*this, groups_, workers_, splits_, spares_caller());
    if (failed_group_.load() >= groups_) write_sums();
  }
  const int failed = failed_group_.load();
  return failed < groups_ ? outcomes_[failed] : Outcome{};
}

void Replay::write_sums() {
  SumWriter writer(sums_, call_.sums, parts_.front().program.sizes().accumulator);
  if (workers_ > 1 && writer.pieces() > 1)
    engine_.run(writer, writer.pieces(), workers_, false, false);
  else
    for (int piece = 0; piece < writer.pieces(); ++piece) writer.run_group(piece, 0);
}

void Replay::run_group(int index, int worker) noexcept {
  std::byte* const sums = sums_.acquire();
  const int64_t tasks = parts_.back().end;
  const int64_t first = index * tasks / groups_, end = (index + 1) * tasks / groups_;
  for (int part = 0; part < static_cast<int>(parts_.size()); ++part)
    if (!run_part(part, index, worker, sums, first, end)) return;
  sums_.finish(index, sums);
}

// Of a group's tasks those that are the part's.
bool Replay::run_part(int part, int group, int worker, std::byte* sums, int64_t first, int64_t end) noexcept {
  const Part& own = parts_[part];
  first = std::max(first, own.first);
  end = std::min(end, own.end);
  if (first >= end) return true;
  Group running{group, worker, part, Frame(own, engine_.arenas[worker].data())};
  running.frame.begin_group(sums);
  if (std::exchange(held_[worker], part + 1) != part + 1) running.frame.forget_kept();
  for (int64_t t = first; t < end; ++t)
    if (!run_task(running, t - own.first)) return false;
  return true;
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
  const Part& part = parts_[group.part];
  if (part.program.section(kMeta).instructions.empty()) return true;
  for (int64_t end = steps, first; end > 0; end = first) {
    first = (end - 1) / part.layout.every * part.layout.every;
    if (end < steps && !run_steps(group, t, first, end - 1, steps)) return false;
    for (int64_t k = end; k-- > first; ++group.adjoints)
      if (!run_section(group, {kMeta, t, k, steps})) return false;
  }
  return true;
}

bool Replay::run_section(Group& group, const Place& place) noexcept {
  const Part& part = parts_[group.part];
  const SectionCode& code = part.program.section(place.section);
  const auto& instructions = code.instructions;
  if (instructions.empty()) return true;
  if (stopped(group, place, code.nanoseconds)) return false;
  group.frame.write_record(place.task, place.step, place.steps);
  group.frame.move_to(place.section, place.task, place.step, group.adjoints);
  const bool slow = code.nanoseconds > kTick;
  const bool set_up = place.section == kPrologue && set_up_[group.worker] == group.part + 1;
  for (size_t n = 0; n < instructions.size(); ++n) {
    if (set_up && instructions[n].sets_up) continue;
    if (slow && stopped(group, place, code.info[n].nanoseconds)) return false;
    const int status = times_ ? run_timed(group, instructions[n], (*times_)[group.part][place.section][n])
                              : run_instruction(group, instructions[n]);
    if (status) [[unlikely]] {
      record(group, place, static_cast<int>(n), status);
      return false;
    }
  }
  if (place.section == kPrologue) set_up_[group.worker] = part.shares_setup ? group.part + 1 : 0;
  return true;
}

int Replay::run_instruction(Group& group, const Instruction& instruction) noexcept {
  if (instruction.most_parts > 1)
    if (const int helpers = engine_.helpers(); helpers > 0)
      return engine_.run_in_parts(instruction, group.frame.operands(instruction),
                                  parts_[group.part].layout.scratch,
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
bool reaches(const External& external, int64_t tasks, int64_t steps) {
  int64_t by_task, by_step;
  return !__builtin_mul_overflow(external.task_stride, tasks * 4, &by_task) &&
         !__builtin_mul_overflow(external.step_stride, (steps + 1) * 4, &by_step);
}

void check_external(const Portion& portion, int64_t steps, int j) {
  const ExternalUse& use = portion.program->external(j);
  const External& external = portion.externals[j];
  const auto name = [j] { return "external " + std::to_string(j) + ": "; };
  if (!use.touched || portion.tasks == 0) return;
  if (external.pointer == 0) check(false, name() + "null pointer");
  if ((external.pointer | external.task_stride | external.step_stride) % use.element)
    check(false, name() + "pointer and strides must be multiples of the element's " +
                     std::to_string(use.element) + " bytes, got " + std::to_string(external.pointer) + ", " +
                     std::to_string(external.task_stride) + ", " + std::to_string(external.step_stride));
  if (!reaches(external, portion.tasks, steps)) check(false, name() + "strides beyond all memory");
  if (use.written && external.task_stride == 0 && portion.tasks > 1)
    check(false, name() + "every task writes to the same place; give it a task stride, or use accumulators");
}

void check_portion(const Call& call, const Portion& portion) {
  const Program& program = *portion.program;
  const Program& first = *call.portions.front().program;
  check(static_cast<int>(portion.externals.size()) == program.n_external(),
        std::to_string(program.n_external()) + " externals expected, got " +
            std::to_string(portion.externals.size()));
  check_count(portion.tasks, "tasks");
  check(program.dtype() == first.dtype() && program.sizes().accumulator == first.sizes().accumulator,
        "portions: programs of one dtype and of the same accumulators expected");
  check(!call.steps_of || (program.lanes() == 1 && call.portions.size() == 1),
        "steps of each task: one program of one lane expected");
  for (int j = 0; j < program.n_external(); ++j) check_external(portion, call.steps, j);
}

void check_steps(const Call& call) {
  check_count(call.steps, "steps");
  const int64_t most = std::max<int64_t>(call.steps, 1);
  check(call.every >= 1 && call.every <= most,
        "every: 1 to " + std::to_string(most) + " expected, got " + std::to_string(call.every));
}

void check_steps_of(const Call& call) {
  for (int64_t t = 0; call.steps_of && t < call.portions.front().tasks; ++t)
    if (call.steps_of[t] < 0 || call.steps_of[t] > call.steps)
      check(false, "steps of task " + std::to_string(t) + ": 0 to " + std::to_string(call.steps) +
                       " expected, got " + std::to_string(call.steps_of[t]));
}

void check_call(const Call& call) {
  check(!call.portions.empty(), "portions: at least one expected, got none");
  check_steps(call);
  check(call.threads >= 1 && call.threads <= kMostThreads,
        "threads: 1 to " + std::to_string(kMostThreads) + " expected, got " + std::to_string(call.threads));
  for (const Portion& portion : call.portions) check_portion(call, portion);
  check_steps_of(call);
  const int64_t bytes = call.portions.front().program->sizes().accumulator;
  for (const Sum& sum : call.sums)
    check(sum.offset >= 0 && sum.bytes >= 0 && sum.offset <= bytes - sum.bytes,
          "sums: within the " + std::to_string(bytes) + " bytes expected, got " + std::to_string(sum.bytes) +
              " from " + std::to_string(sum.offset));
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
Outcome start_within(Call call, std::vector<Times>* times) {
  call.threads = 1;
  const auto engine = std::make_unique<Engine>();
  asking = false;
  const Outcome outcome = Replay(call, *engine, times).run();
  asking = true;
  return outcome;
}

Outcome start(const Call& call, std::vector<Times>* times) {
  check_call(call);
  if (asking) return start_within(call, times);
  Engine& engine = Engine::current();
  const Lock lock = hold(engine, call);
  if (!lock) return {.status = kCancelled};
  return Replay(call, engine, times).run();
}

}  // namespace

Outcome replay(const Call& call) { return start(call, nullptr); }

Outcome profile(const Call& call, std::vector<Times>& times) {
  times.resize(call.portions.size());
  for (size_t p = 0; p < times.size(); ++p)
    for (int s = 0; s < kSections; ++s)
      times[p][s].resize(call.portions[p].program->section(s).instructions.size());
  return start(call, &times);
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
