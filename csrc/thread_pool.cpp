#include "thread_pool.hpp"

#include <chrono>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace metafast {
namespace {

constexpr std::chrono::microseconds kSpin{20};

void relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns once `value` differs from `old`: spins first, then sleeps.
void await_change(std::atomic<uint32_t>& value, uint32_t old) noexcept {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int n = 0; n < 16; ++n) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() - start < kSpin);
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

void ThreadPool::start_worker() {
  workers_.push_back(std::make_unique<Worker>());
  Worker& self = *workers_.back();
  const int index = static_cast<int>(workers_.size());
  try {
    std::thread([this, &self, index] { work(self, index); }).detach();
  } catch (...) {
    workers_.pop_back();
    throw;
  }
}

void ThreadPool::work(Worker& self, int index) {
  for (uint32_t done = 0;; ++done) {
    await_change(self.ticket, done);
    job_(context_, index);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
  }
}

void ThreadPool::run(int workers, Job job, void* context) {
  while (static_cast<int>(workers_.size()) < workers - 1) start_worker();
  job_ = job;
  context_ = context;
  unfinished_.store(static_cast<uint32_t>(workers - 1), std::memory_order_relaxed);
  for (int w = 0; w < workers - 1; ++w) {
    workers_[w]->ticket.fetch_add(1, std::memory_order_release);
    workers_[w]->ticket.notify_one();
  }
  job(context, 0);
  while (const uint32_t left = unfinished_.load(std::memory_order_acquire)) await_change(unfinished_, left);
}

}  // namespace metafast
