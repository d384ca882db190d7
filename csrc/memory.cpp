#include "memory.hpp"

#include <cstdlib>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace metafast {
namespace {

// From here on a buffer asks for huge pages: an arena of some MiB walked once an instruction misses the TLB
// otherwise.
constexpr int64_t kHuge = int64_t{2} << 20;

// What the C library may keep for itself: to look through its pages takes 10 ms.
[[maybe_unused]] constexpr size_t kMuch = size_t{16} << 20;

std::byte* allocate(int64_t bytes) {
  const bool huge = bytes >= 2 * kHuge;
  const int64_t alignment = huge ? kHuge : kAlignment;
  const int64_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(rounded));
  if (memory == nullptr) throw std::bad_alloc();
#ifdef __linux__
  if (huge) madvise(memory, static_cast<size_t>(rounded), MADV_HUGEPAGE);  // a wish: failure changes nothing
#endif
  return static_cast<std::byte*>(memory);
}

}  // namespace

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

std::byte* Buffer::reserve(int64_t bytes) {
  if (bytes <= bytes_) return data_;
  release();
  data_ = allocate(bytes);
  bytes_ = bytes;
  return data_;
}

void Buffer::release() noexcept {
  std::free(data_);
  data_ = nullptr;
  bytes_ = 0;
}

void return_free_pages() noexcept {
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 33)
  if (mallinfo2().fordblks >= kMuch) malloc_trim(0);
#endif
}

}  // namespace metafast
