// Threads that are woken to look for work, and work they take by shares.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace metafast {

// Waiting for what another thread will do within microseconds: tells the processor, and from some point on
// the operating system too (there may be more threads than cores).
class Backoff {
 public:
  void pause() noexcept;

 private:
  int spins_ = 0;
};

// Shares 0..count-1 of one piece of work, each taken once, by whichever worker comes first; nobody waits for
// a worker that has taken none. What a share needs may be read once it is taken: it stays valid until all are
// finished.
class Shares {
 public:
  enum End { kFirst, kLast };  // from which a worker takes
  // By the owner, when all earlier shares are finished. Only workers 0..workers-1 may take one.
  void open(int count, int workers) noexcept;
  int take(int worker, End from) noexcept;  // a share, or -1
  void finish() noexcept { unfinished_.fetch_sub(1, std::memory_order_release); }
  bool finished() const noexcept { return unfinished_.load(std::memory_order_acquire) == 0; }

 private:
  std::atomic<uint64_t> state_{0};  // workers, end, next: 16 bits each
  std::atomic<int> unfinished_{0};
};

// Started when first needed, a thread lives as long as the process. Woken, it calls serve(context, worker);
// after that it spins for up to 20 µs, lets others run for up to 200 µs, and then sleeps. Not safe for two callers at once: its owner locks. The
// threads do not exist in a forked child: it must build a new pool.
class ThreadPool {
 public:
  using Serve = void (*)(void* context, int worker) noexcept;

  ThreadPool(Serve serve, void* context) : serve_(serve), context_(context) {}

  // Workers 1..workers-1 exist; worker 0 is the caller, not a thread. Throws std::system_error where one
  // cannot start.
  void start(int workers);
  // Each of these will call `serve` once more; does not wait for them.
  void wake(int workers) noexcept;

 private:
  struct alignas(64) Worker {
    std::atomic<uint32_t> ticket{0};  // how often it was woken
  };

  void start_worker();

  const Serve serve_;
  void* const context_;
  std::vector<std::unique_ptr<Worker>> workers_;  // worker w is workers_[w - 1]
};

}  // namespace metafast
