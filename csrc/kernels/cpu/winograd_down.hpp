// 3×3 convolutions of few channels, of stride and dilation 1, by F(4, 3) down the columns: 18 products for 4 results
// where the direct form has 36.
//
//   y = Aᵀ Σ_kw [ (G g_kw) ⊙ (Bᵀ d_kw) ]      for every 4 rows of a column of y; d_kw the 6 pixels of x under it at tap kw
//   dg_kw = Gᵀ Σ [ (A dy) ⊙ (Bᵀ d_kw) ]
// summed over channels, too. Of few channels the transforms of results cost more than what else they would save across;
// down the columns alone they stay in registers, and those of x are passes over whole rows of it. The points are those of
// winograd_axis.hpp.
//
// float only. The bounds of the error are those that the rows of conv2d, conv2d_dx and conv2d_dw (metafast/ops/contract.py)
// state for "winograd down".
#pragma once
#include "conv_correlation.hpp"

namespace metafast::kernels::METAFAST_ISA {

// Whether it takes less time than the direct form, where winograd.hpp's has not been found to.
bool winograd_down_suits(const Correlation<float>&) noexcept;
bool winograd_down_dw_suits(const ConvInts&) noexcept;

// The same contract as conv_fwd and conv_dx, conv_dw (conv.hpp), where it suits.
int winograd_down_correlate(const Correlation<float>&, const Args&) noexcept;
int winograd_down_dw(const ConvInts&, const Args&) noexcept;

int64_t winograd_down_correlate_scratch(const Correlation<float>&) noexcept;
int64_t winograd_down_dw_scratch(const ConvInts&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
