// Memory fetched before it is needed. The processor fetches ahead by itself along every stream, but stops at the end of a
// page and begins anew with every window and every tile; what is computed in between then waits for memory.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

inline constexpr int64_t kCacheLine = 64;

// What lies a page ahead of p, in a stream that is read or written from there on.
template <class T>
METAFAST_INLINE void fetch_ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const std::byte*>(p) + kAheadBytes);
}

// A stretch of memory that is needed next, fetched a share at a time between products, into the second-level cache.
struct Ahead {
  const std::byte* begin;
  int64_t bytes;

  template <class T>
  static Ahead of(const T* from, const T* to) {
    return {reinterpret_cast<const std::byte*>(from), (to - from) * static_cast<int64_t>(sizeof(T))};
  }
  METAFAST_INLINE void fetch(int64_t part, int64_t parts) const {
    const Range mine =
        share((bytes + kCacheLine - 1) / kCacheLine, static_cast<int>(part), static_cast<int>(parts));
    for (int64_t k = mine.begin; k < mine.end; ++k) __builtin_prefetch(begin + k * kCacheLine, 0, 2);
  }
  // So many bytes of it, which are then no longer part of it.
  METAFAST_INLINE void fetch_first(int64_t wanted) {
    const std::byte* const end = begin + min64(wanted, bytes);
    for (const std::byte* p = begin; p < end; p += kCacheLine) __builtin_prefetch(p, 0, 2);
    bytes -= end - begin, begin = end;
  }
};

}  // namespace metafast::kernels::METAFAST_ISA
