#include "round_trip.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace metafast {
namespace {

using Cores = std::optional<std::pair<int, int>>;

#if defined(__linux__)
Cores outermost_cores() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return std::nullopt;
  int first = 0, last = CPU_SETSIZE - 1;
  while (!CPU_ISSET(first, &allowed)) ++first;
  while (!CPU_ISSET(last, &allowed)) --last;
  return std::pair(first, last);
}

bool hold_to(int core) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  return pthread_setaffinity_np(pthread_self(), sizeof one, &one) == 0;
}
#else
Cores outermost_cores() { return std::thread::hardware_concurrency() < 2 ? Cores() : std::pair(0, 1); }

bool hold_to(int) { return true; }
#endif

// Of one side each: even numbers are the first thread's to answer, odd ones the second's.
struct Exchange {
  static constexpr int kTrips = 200;
  static constexpr size_t kTimes = 15;

  alignas(64) std::atomic<int> line{0};
  alignas(64) std::atomic<int> arrived{0};
  std::atomic<bool> held{true};
  std::array<double, kTimes> seconds;

  // Both threads stand on their cores before the first exchange.
  bool arrive(int core) {
    if (!hold_to(core)) held = false;
    ++arrived;
    while (arrived.load() < 2) std::this_thread::yield();
    return held;
  }

  void await(int value) const {
    while (line.load(std::memory_order_acquire) != value) {
    }
  }

  void lead(int core) {
    if (!arrive(core)) return;
    int sent = 0;
    for (double& time : seconds) {
      const auto start = std::chrono::steady_clock::now();
      for (int trip = 0; trip < kTrips; ++trip, sent += 2) {
        line.store(sent + 1, std::memory_order_release);
        await(sent + 2);
      }
      const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
      time = passed.count() / kTrips;
    }
  }

  void follow(int core) {
    if (!arrive(core)) return;
    for (int got = 1; got < 2 * kTrips * static_cast<int>(kTimes); got += 2) {
      await(got);
      line.store(got + 1, std::memory_order_release);
    }
  }
};

}  // namespace

std::optional<double> round_trip() {
  const Cores cores = outermost_cores();
  if (!cores) return std::nullopt;
  Exchange exchange;
  std::thread other([&] { exchange.follow(cores->second); });
  std::thread([&] { exchange.lead(cores->first); }).join();
  other.join();
  if (!exchange.held) return std::nullopt;
  auto& seconds = exchange.seconds;
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return seconds[seconds.size() / 2];
}

}  // namespace metafast
