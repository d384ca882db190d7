// 3×3 convolutions of stride and dilation 1 by Winograd's F(4×4, 3×3): 36 products where the direct form has
// 144.
//
//   y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A      for every 4×4 tile of y, with d the 6×6 tile of x under it
//   dg = Gᵀ [ Σ_tiles (A dy Aᵀ) ⊙ (Bᵀ d B) ] G
// summed over channels, which makes each of the 36 points a matrix product. (Lavin and Gray,
// arXiv:1509.09308.) The points of an axis are ∞, 0, ±a, ±b. Only the last row of a tile needs the one at
// infinity, so an axis that is no multiple of 4 has tiles of 3 as well, of 5 points: none reaches over the edge
// of an image of 3, 4, or 6 and more.
//
// float only. The error is small against the largest terms, not against each element's own; its bounds are those that
// the rows of conv2d, conv2d_dx and conv2d_dw (metafast/ops/contract.py) state for "winograd".
#pragma once
#include "conv_correlation.hpp"

namespace metafast::kernels::METAFAST_ISA {

// Whether the transforms cost less than the products they save.
bool winograd_suits(const Correlation<float>&) noexcept;
bool winograd_dw_suits(const ConvInts&) noexcept;

// Writes the filters of a correlation, transformed, where winograd_filter_elements have room.
int winograd_transform(const Correlation<float>&, float* into, const Args&) noexcept;
int64_t winograd_transform_scratch(const Correlation<float>&) noexcept;

// The same contract as conv_fwd and conv_dx, conv_dw (conv.hpp), where it suits.
int winograd_correlate(const Correlation<float>&, const Args&) noexcept;
int winograd_dw(const ConvInts&, const Args&) noexcept;

int64_t winograd_correlate_scratch(const Correlation<float>&) noexcept;
int64_t winograd_dw_scratch(const ConvInts&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
