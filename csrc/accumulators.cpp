#include "accumulators.hpp"

#include <algorithm>

#include "memory.hpp"

namespace metafast {
namespace {

template <class T>
void add_elements(std::byte* into, const std::byte* from, int64_t bytes) {
  T* const a = reinterpret_cast<T*>(into);
  const T* const b = reinterpret_cast<const T*>(from);
  for (int64_t n = 0; n < bytes / static_cast<int64_t>(sizeof(T)); ++n) a[n] += b[n];
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
    add(left, right);
    set = left;
    const std::lock_guard lock(mutex_);
    free_[n_free_++] = right;
  }
  root_ = set;
}

void AccumulatorTree::add(std::byte* into, const std::byte* from) const {
  if (dtype_ == kernels::DType::f32)
    add_elements<float>(into, from, bytes_);
  else
    add_elements<double>(into, from, bytes_);
}

}  // namespace metafast
