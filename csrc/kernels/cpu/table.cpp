#include "table.hpp"

#include "conv.hpp"
#include "gemm.hpp"
#include "normalise.hpp"
#include "one_hot.hpp"
#include "pointwise.hpp"
#include "pool.hpp"
#include "reduce.hpp"
#include "scan.hpp"
#include "softmax.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

int64_t none(const int64_t*) noexcept { return 0; }

template <class T>
struct Rows {
  static constexpr Kernel rows[] = {
      {"pointwise", pointwise<T>, pointwise_scratch<T>, true, pointwise_prepared_bytes<T>,
       pointwise_prepare<T>},
      {"reduce", reduce<T>, none, true},
      {"gemm", gemm<T>, gemm_scratch<T>, true, gemm_prepared_bytes<T>, gemm_prepare<T>, gemm_keeps<T>,
       gemm_keep<T>},
      {"conv_fwd", conv_fwd<T>, conv_fwd_scratch<T>, true},
      {"conv_dx", conv_dx<T>, conv_dx_scratch<T>, true},
      {"conv_dw", conv_dw<T>, conv_dw_scratch<T>, true},
      {"winograd_filters", winograd_filters<T>, winograd_filters_scratch<T>, true},
      {"standardize", standardize<T>, none, true},
      {"moments", moments<T>, none, true},
      {"join_moments", join_moments<T>, none, true},
      {"project", project<T>, none, true},
      {"project_tangent", project_tangent<T>, none, true},
      {"log_softmax", log_softmax<T>, none, true},
      {"max_pool", max_pool<T>, none, true},
      {"pool_gather", pool_gather<T>, none, true},
      {"pool_scatter", pool_scatter<T>, none, true},
      {"avg_pool", avg_pool<T>, none, true},
      {"avg_pool_adj", avg_pool_adj<T>, none, true},
      {"one_hot", one_hot<T>, none, true},
      {"fill", fill<T>, none, true},
      {"cumsum", cumsum<T>, none, true},
  };
  static constexpr KernelTable table{rows, sizeof rows / sizeof rows[0]};
};

}  // namespace

KernelTable table_f32() noexcept { return Rows<float>::table; }
KernelTable table_f64() noexcept { return Rows<double>::table; }

}  // namespace metafast::kernels::METAFAST_ISA
