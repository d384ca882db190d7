#include "accumulators.hpp"

#include <algorithm>

#include "memory.hpp"

namespace metafast {
namespace {

template <class T>
void add_elements(const std::byte* left, const std::byte* right, std::byte* into, int64_t bytes) {
  const T *const a = reinterpret_cast<const T*>(left), *const b = reinterpret_cast<const T*>(right);
  T* const c = reinterpret_cast<T*>(into);
  for (int64_t n = 0; n < bytes / static_cast<int64_t>(sizeof(T)); ++n) c[n] = a[n] + b[n];
}

// into = left + right; it may be one of them.
void add(const std::byte* left, const std::byte* right, std::byte* into, int64_t bytes,
         kernels::DType dtype) {
  if (dtype == kernels::DType::f32)
    add_elements<float>(left, right, into, bytes);
  else
    add_elements<double>(left, right, into, bytes);
}

}  // namespace

AccumulatorTree::AccumulatorTree(std::byte* memory, int groups, int64_t bytes, kernels::DType dtype)
    : groups_(groups), bytes_(bytes), dtype_(dtype), n_free_(groups) {
  for (int g = 0; g < groups; ++g) free_[groups - 1 - g] = memory + g * aligned(bytes);
}

int64_t AccumulatorTree::bytes_needed(int groups, int64_t bytes) { return groups * aligned(bytes); }

std::byte* AccumulatorTree::acquire() {
  std::byte* set;
  {
    const std::lock_guard lock(mutex_);
    set = free_[--n_free_];
  }
  std::fill_n(set, bytes_, std::byte{0});
  return set;
}

// The other half of the pair `node` belongs to, or null (then `set` waits for it).
std::byte* AccumulatorTree::take_sibling(int level, int node, std::byte* set) {
  const std::lock_guard lock(mutex_);
  std::byte* const other = waiting_[level][node ^ 1];
  if (other == nullptr) waiting_[level][node] = set;
  return other;
}

void AccumulatorTree::finish(int group, std::byte* set) {
  int node = group;
  for (int level = 0, nodes = groups_; nodes > 1; ++level, node /= 2, nodes = (nodes + 1) / 2) {
    if ((node ^ 1) >= nodes) continue;  // no other half at this level
    std::byte* const other = take_sibling(level, node, set);
    if (other == nullptr) return;
    std::byte* const left = node % 2 ? other : set;
    std::byte* const right = node % 2 ? set : other;
    set = left;
    if (nodes == 2) {
      right_ = right;
      break;
    }
    add(left, right, left, bytes_, dtype_);
    const std::lock_guard lock(mutex_);
    free_[n_free_++] = right;
  }
  left_ = set;
}

void AccumulatorTree::write(int64_t offset, int64_t bytes, std::byte* into) const {
  if (left_ == nullptr)
    std::fill_n(into, bytes, std::byte{0});
  else if (right_ == nullptr)
    std::copy_n(left_ + offset, bytes, into);
  else
    add(left_ + offset, right_ + offset, into, bytes, dtype_);
}

}  // namespace metafast
