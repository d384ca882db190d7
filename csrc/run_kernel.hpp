// One kernel by itself: what tests and benchmarks of kernels call.
#pragma once
#include <cstdint>
#include <span>
#include <string_view>

#include "kernels/common/kernels.hpp"

namespace metafast {

// Runs the kernel, its parts one after the other; its status. Throws std::invalid_argument for counts or ints
// that make no sense. What the operands point to is the caller's business.
int run_kernel(std::string_view name, kernels::DType dtype, kernels::Isa isa, std::span<void* const> operands,
               std::span<const int64_t> ints, std::span<const double> floats, int parts);

}  // namespace metafast
