// A pool of threads for jobs of a few microseconds to seconds. Not safe for two callers at once: its owner
// locks.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace metafast {

// One wait for something another thread will do within microseconds: tell the processor, and from some point
// on the operating system too (there may be more threads than cores).
class Backoff {
 public:
  void pause() noexcept;

 private:
  int spins_ = 0;
};

// Threads are started when first needed, spin for up to 20 µs between jobs and then sleep, and live as long
// as the process. In a forked child they do not exist: the child must build a new pool (see replay.cpp).
class ThreadPool {
 public:
  using Job = void (*)(void* context, int worker) noexcept;

  // Calls job(context, w) for w = 0..workers-1, w = 0 on the calling thread, and returns when all have
  // returned. Throws std::system_error where a thread cannot be started (no job has run then).
  void run(int workers, Job job, void* context);

 private:
  struct alignas(64) Worker {
    std::atomic<uint32_t> ticket{0};  // counts the jobs given to this worker
  };

  void start_worker();
  void work(Worker& self, int index);

  Job job_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> unfinished_{0};
  std::vector<std::unique_ptr<Worker>> workers_;  // worker w of a job is workers_[w - 1]
};

}  // namespace metafast
