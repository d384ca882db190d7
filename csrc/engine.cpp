#include "engine.hpp"

#include <pthread.h>

#include <algorithm>

namespace metafast {
namespace {

std::atomic<Engine*> current_engine{nullptr};

}  // namespace

Engine::Engine() : pool_(&Engine::serve, this) {}

// The threads are gone in a child, and one of them may have held the mutex.
void Engine::forget() noexcept { current_engine.store(nullptr); }

// When the module is loaded, not at the first call: a child forked in the middle of that would wait for it for ever.
[[maybe_unused]] const int Engine::registered = pthread_atfork(nullptr, nullptr, &Engine::forget);

// Never destroyed: threads may be asleep in it when the process ends.
Engine& Engine::current() {
  if (Engine* const present = current_engine.load()) return *present;
  std::unique_ptr<Engine> fresh(new Engine);
  Engine* expected = nullptr;
  return current_engine.compare_exchange_strong(expected, fresh.get()) ? *fresh.release() : *expected;
}

void Engine::run(GroupRunner& runner, int groups, int workers, bool help, bool backwards) {
  pool_.start(workers);
  runner_ = &runner;
  workers_ = workers;
  look_.store(workers, std::memory_order_relaxed);
  help_.store(help, std::memory_order_relaxed);
  groups_.open(groups, std::min(groups, workers));
  backwards_ = backwards;
  pool_.wake(workers);
  work(0, [this] { return !groups_.finished(); });
  help_.store(false, std::memory_order_relaxed);
}

void Engine::serve(void* self, int worker) noexcept {
  Engine& engine = *static_cast<Engine*>(self);
  engine.work(worker, [&engine, worker] {
    return engine.help_.load(std::memory_order_relaxed) &&
           worker < engine.look_.load(std::memory_order_relaxed);
  });
}

// Works as long as there is anything to do; with nothing to do, waits for something while `more` says so.
template <class More>
void Engine::work(int worker, More more) noexcept {
  bool idle = false;
  for (Backoff backoff;;) {
    if (worker == 0) runner_->poll();
    if (work_once(worker, idle)) {
      backoff = {};
      continue;
    }
    if (!more()) break;
    set_idle(idle, true);
    backoff.pause();
  }
  set_idle(idle, false);
}

bool Engine::work_once(int worker, bool& idle) noexcept {
  if (const int group = groups_.take(worker, worker == 0 && backwards_ ? Shares::kLast : Shares::kFirst);
      group >= 0) {
    set_idle(idle, false);
    runner_->run_group(group, worker);
    groups_.finish();
    return true;
  }
  const int look = look_.load(std::memory_order_relaxed);
  for (int w = 0; w < look; ++w) {
    const int part = shared_[w].parts.take(worker, Shares::kLast);
    if (part < 0) continue;
    set_idle(idle, false);
    run_part(shared_[w], part, worker);
    set_idle(idle,
             true);  // first: whoever shares it asks who would help with the next as soon as this is finished
    shared_[w].parts.finish();
    return true;
  }
  return false;
}

void Engine::set_idle(bool& idle, bool now) noexcept {
  if (idle == now) return;
  idle = now;
  idle_.fetch_add(now ? 1 : -1, std::memory_order_relaxed);
}

void Engine::run_part(SharedInstruction& shared, int part, int worker) noexcept {
  const Instruction& instruction = *shared.instruction;
  const int status =
      instruction.run({shared.operands, instruction.ints, instruction.floats,
                       arenas[worker].data() + shared.scratch, part, shared.count, instruction.prepared});
  if (status) shared.status.store(status, std::memory_order_relaxed);
}

int Engine::run_in_parts(const Instruction& instruction, void* const* operands, int64_t scratch, int parts,
                         int worker) noexcept {
  SharedInstruction& shared = shared_[worker];
  shared.instruction = &instruction;
  shared.operands = operands;
  shared.scratch = scratch;
  shared.count = parts;
  shared.status.store(0, std::memory_order_relaxed);
  shared.parts.open(parts, workers_);
  for (int part; (part = shared.parts.take(worker, Shares::kFirst)) >= 0;) {
    run_part(shared, part, worker);
    shared.parts.finish();
  }
  for (Backoff backoff; !shared.parts.finished();) backoff.pause();
  return shared.status.load(std::memory_order_relaxed);
}

}  // namespace metafast
