// What one call of a kernel touches, worked out from its ints: the extent of every operand, and how long it
// may take.
#pragma once
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/common/kernel.hpp"

namespace metafast {

// The elements [first, end) around an operand's address, of `element` bytes each; none where end <= first.
struct Access {
  int64_t first, end;
  int element;
  bool writes;
};

struct Signature {
  std::vector<Access> operands;
  bool divisible = true;  // parts of the call share the work; false: part 0 does it all
  double nanoseconds;     // a rough guess for one thread; decides what is worth splitting, never a result
};

// Throws std::invalid_argument, saying what was expected and got, where the kernel is unknown, the number of
// ints or floats is wrong, or the ints make no sense (a negative size, a register or opcode out of range, a
// mode other than 0, 1).
Signature signature(std::string_view kernel, std::span<const int64_t> ints, std::span<const double> floats,
                    kernels::DType dtype);

constexpr int size_of(kernels::DType dtype) { return dtype == kernels::DType::f32 ? 4 : 8; }

}  // namespace metafast
