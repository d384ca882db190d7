#include "thread_pool.hpp"

#include <chrono>
#include <thread>

#include "float_mode.hpp"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace metafast {
namespace {

// A loop over meta-gradients of a small net is back within 200 µs.
constexpr std::chrono::microseconds kSpin{20}, kStay{200};
constexpr uint64_t kMask = 0xffff;

void relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns once `value` differs from `old`: spins first, then lets others run, then sleeps.
void await_change(const std::atomic<uint32_t>& value, uint32_t old) noexcept {
  const auto start = std::chrono::steady_clock::now();
  for (auto since = start - start; since < kStay; since = std::chrono::steady_clock::now() - start) {
    if (since > kSpin) std::this_thread::yield();
    for (int n = 0; n < 16; ++n) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

void Backoff::pause() noexcept {
  constexpr int kSpinsBeforeYield = 512;
  if (++spins_ < kSpinsBeforeYield)
    relax();
  else
    std::this_thread::yield();
}

void Shares::open(int count, int workers) noexcept {
  unfinished_.store(count, std::memory_order_relaxed);
  state_.store(static_cast<uint64_t>(workers) << 32 | static_cast<uint64_t>(count) << 16,
               std::memory_order_release);
}

int Shares::take(int worker, End from) noexcept {
  uint64_t state = state_.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t next = state & kMask, end = state >> 16 & kMask, workers = state >> 32;
    if (next >= end || static_cast<uint64_t>(worker) >= workers) return -1;
    const bool last = from == kLast;
    if (state_.compare_exchange_weak(state, last ? state - (uint64_t{1} << 16) : state + 1,
                                     std::memory_order_acq_rel, std::memory_order_relaxed))
      return static_cast<int>(last ? end - 1 : next);
  }
}

void ThreadPool::start_worker() {
  auto worker = std::make_unique<Worker>();
  const int index = static_cast<int>(workers_.size()) + 1;
  std::thread([this, &ticket = worker->ticket, index] {
    const FlushSubnormals flush;  // these threads do nothing but replay
    for (uint32_t seen = 0;;) {
      await_change(ticket, seen);
      seen = ticket.load(std::memory_order_acquire);
      serve_(context_, index);
    }
  }).detach();
  workers_.push_back(std::move(worker));
}

void ThreadPool::start(int workers) {
  workers_.reserve(static_cast<size_t>(workers));
  while (static_cast<int>(workers_.size()) < workers - 1) start_worker();
}

void ThreadPool::wake(int workers) noexcept {
  for (int w = 1; w < workers; ++w) {
    std::atomic<uint32_t>& ticket = workers_[w - 1]->ticket;
    ticket.fetch_add(1, std::memory_order_release);
    ticket.notify_one();
  }
}

}  // namespace metafast
