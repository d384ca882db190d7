#include "run_kernel.hpp"

#include <stdexcept>
#include <string>

#include "memory.hpp"
#include "signature.hpp"

namespace metafast {
namespace {

void check(bool good, std::string_view kernel, const std::string& message) {
  if (!good) throw std::invalid_argument(std::string(kernel) + ": " + message);
}

}  // namespace

int run_kernel(std::string_view name, kernels::DType dtype, kernels::Isa isa, std::span<void* const> operands,
               std::span<const int64_t> ints, std::span<const double> floats, int parts) {
  const Signature sig = signature(name, ints, floats, dtype);
  check(sig.operands.size() == operands.size(), name,
        std::to_string(sig.operands.size()) + " pointers expected, got " + std::to_string(operands.size()));
  const kernels::Kernel* kernel = kernels::find_kernel(name, dtype, isa);
  check(kernel != nullptr, name, "not in this build");
  check(parts == 1 || (parts > 1 && kernel->splittable), name, "cannot be split into parts");
  Buffer scratch, prepared;
  scratch.reserve(kernel->scratch ? kernel->scratch(ints.data()) : 0);
  if (kernel->prepare)
    kernel->prepare(ints.data(), floats.data(), prepared.reserve(kernel->prepared_bytes(ints.data())));
  for (int part = 0; part < parts; ++part)
    if (const int status = kernel->run(
            {operands.data(), ints.data(), floats.data(), scratch.data(), part, parts, prepared.data()}))
      return status;
  return kernels::kOk;
}

}  // namespace metafast
