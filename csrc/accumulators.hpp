// Sums over task groups: one set of accumulators a group, added in a tree whose shape depends on the number
// of groups alone. A pair is added as soon as both halves are done, so few sets exist at a time; the last one where the
// sums are wanted, which threads share.
#pragma once
#include <array>
#include <cstdint>
#include <mutex>

#include "kernels/common/kernel.hpp"
#include "replay.hpp"

namespace metafast {

class AccumulatorTree {
 public:
  // `memory` holds bytes_needed(groups, bytes) bytes; it is touched only as far as it is used.
  AccumulatorTree(std::byte* memory, int groups, int64_t bytes, kernels::DType dtype);
  static int64_t bytes_needed(int groups, int64_t bytes);

  std::byte* acquire();                    // a zeroed set for one group
  void finish(int group, std::byte* set);  // hands it back, complete
  // The sums of all groups, from `offset` on, after every group has finished.
  void write(int64_t offset, int64_t bytes, std::byte* into) const;

 private:
  static constexpr int kLevels = 7;  // 2^6 = kMaxGroups leaves

  std::byte* take_sibling(int level, int node, std::byte* set);

  int groups_;
  int64_t bytes_;
  kernels::DType dtype_;
  std::mutex mutex_;
  std::array<std::byte*, kMaxGroups> free_;
  int n_free_;
  std::array<std::array<std::byte*, kMaxGroups>, kLevels> waiting_{};
  std::byte *left_ = nullptr, *right_ = nullptr;  // all there is to add at last, the second null of one group
};

}  // namespace metafast
