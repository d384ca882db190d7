// What outlives a call: threads, their memory, and the places where they find work.
#pragma once
#include <array>
#include <atomic>
#include <mutex>
#include <vector>

#include "memory.hpp"
#include "program.hpp"
#include "thread_pool.hpp"

namespace metafast {

inline constexpr int kMostThreads = 256;

// What a replay does with a group of tasks it is given.
class GroupRunner {
 public:
  virtual void run_group(int group, int worker) noexcept = 0;
  virtual void poll() noexcept = 0;  // by worker 0, again and again as long as it is not in a group

 protected:
  ~GroupRunner() = default;
};

// One for the process. Workers take groups of tasks as they come; a worker that finds none left helps those
// that still run one with their long instructions. Nobody waits for a worker that has taken nothing, so a
// thread that wakes up late, or not at all for a while, costs no time.
class Engine {
 public:
  Engine();
  static Engine& current();  // a new one in a forked child

  std::timed_mutex mutex;      // one replay at a time holds it
  std::vector<Buffer> arenas;  // one a worker
  Buffer accumulators;

  // Runs groups 0..groups-1 on `workers` threads, this one included; returns when all have run. Only workers
  // 0..groups-1 run one, this one from the last on if `backwards`. With `help`, idle workers look for shared
  // instructions until then. Throws std::system_error before anything has run.
  void run(GroupRunner& runner, int groups, int workers, bool help, bool backwards);

  // How many workers would help right now. May be out of date when it is used: nothing depends on it but
  // speed.
  int helpers() const noexcept { return idle_.load(std::memory_order_relaxed); }

  // Runs one instruction of the group `worker` is running in `parts`, with the help of whoever comes: that takes parts
  // from the last on, so that of two threads each finds in its cache what it wrote of the last instruction. Every
  // worker has its scratch `scratch` bytes into its arena. The kernel's status: that of some part that
  // failed, or 0.
  int run_in_parts(const Instruction& instruction, void* const* operands, int64_t scratch, int parts,
                   int worker) noexcept;

 private:
  struct alignas(64) SharedInstruction {
    Shares parts;
    const Instruction* instruction;
    void* const* operands;
    int64_t scratch;
    int count;
    std::atomic<int> status;
  };

  static const int registered;
  static void forget() noexcept;
  static void serve(void* self, int worker) noexcept;
  template <class More>
  void work(int worker, More more) noexcept;
  bool work_once(int worker, bool& idle) noexcept;
  void run_part(SharedInstruction& shared, int part, int worker) noexcept;
  void set_idle(bool& idle, bool now) noexcept;

  Shares groups_;
  GroupRunner* runner_ = nullptr;  // whom the shares of groups_ belong to
  int workers_ = 1;
  bool backwards_ = false;  // read by worker 0 alone
  alignas(64) std::atomic<bool> help_{false};
  std::atomic<int> look_{1};  // instructions may be shared by workers 0..look_-1
  std::atomic<int> idle_{0};
  std::array<SharedInstruction, kMostThreads> shared_{};  // by the worker that shares it
  ThreadPool pool_;
};

}  // namespace metafast
