// The rows of one instruction set, in the order of the catalogue.
#pragma once
#include "../common/kernels.hpp"

namespace metafast::kernels {
#define METAFAST_DECLARE_TABLE(isa) \
  namespace isa {                   \
  KernelTable table_f32() noexcept; \
  KernelTable table_f64() noexcept; \
  }
METAFAST_DECLARE_TABLE(baseline)
METAFAST_DECLARE_TABLE(avx2)
METAFAST_DECLARE_TABLE(avx512)
#undef METAFAST_DECLARE_TABLE
}  // namespace metafast::kernels
