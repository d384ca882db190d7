// Memory aligned to cache lines that only grows: what arenas, accumulators and constants live in.
#pragma once
#include <cstddef>
#include <cstdint>

namespace metafast {

inline constexpr int64_t kAlignment = 64;

constexpr int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer() { release(); }

  // Holds at least `bytes`; the old contents are lost where it has to grow. Throws std::bad_alloc.
  std::byte* reserve(int64_t bytes);
  void release() noexcept;
  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Gives back to the system what the C library has kept of memory freed by others, where that is much and it can.
void return_free_pages() noexcept;

}  // namespace metafast
