// Threads that share one task group: they meet at barriers, numbered from 0, and leave together at the first
// barrier at or before which one of them failed.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "thread_pool.hpp"

namespace metafast {

class Team {
 public:
  void set_members(int members) noexcept { members_ = members; }
  int members() const noexcept { return members_; }

  // The caller fails before barrier number `barrier`. True for the first to do so: it keeps the outcome.
  bool fail(int64_t barrier) noexcept {
    int64_t none = kNever;
    return failed_at_.compare_exchange_strong(none, barrier, std::memory_order_acq_rel);
  }

  // Waits until every member has come to barrier number `barrier`. False: leave.
  bool meet(int64_t barrier) noexcept {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      for (Backoff backoff; round_.load(std::memory_order_acquire) == round;) backoff.pause();
    }
    // A faster member may have failed on the way to the next barrier already: that one is not for this
    // barrier.
    return failed_at_.load(std::memory_order_acquire) > barrier;
  }

  std::byte* accumulators = nullptr;  // of the group: set by the leader before barrier 0

 private:
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int64_t> failed_at_{kNever};
  int members_ = 1;
};

}  // namespace metafast
