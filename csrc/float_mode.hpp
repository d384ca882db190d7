// Subnormals count as zero while one of these lives on this thread; the thread's mode is put back at its end.
#pragma once
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace metafast {

class FlushSubnormals {
 public:
  FlushSubnormals() noexcept : saved_(mode()) { set_mode(saved_ | kFlush); }
  ~FlushSubnormals() { set_mode(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

  // What `run` gives, run in the mode this thread was in before.
  template <class Run>
  auto lifted(Run run) const {
    set_mode(saved_);
    const auto result = run();
    set_mode(saved_ | kFlush);
    return result;
  }

 private:
#if defined(__SSE2__)
  static constexpr uint64_t kFlush = 0x8040;  // FTZ and DAZ
  static uint64_t mode() noexcept { return _mm_getcsr(); }
  static void set_mode(uint64_t mode) noexcept { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;  // FZ
  static uint64_t mode() noexcept {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(uint64_t mode) noexcept { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t mode() noexcept { return 0; }
  static void set_mode(uint64_t) noexcept {}
#endif

  const uint64_t saved_;
};

}  // namespace metafast
