// 3×3 convolutions of stride and dilation 1 by Winograd's F(2×2, 3×3): 16 products where the direct form has
// 36.
//
//   y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A      for every 2×2 tile of y, with d the 4×4 tile of x under it
//   dg = Gᵀ [ Σ_tiles (A dy Aᵀ) ⊙ (Bᵀ d B) ] G
// summed over channels, which makes each of the 16 points a matrix product. (Lavin and Gray,
// arXiv:1509.09308.)
//
// float only. The error is small against the largest terms, not against each element's own: at most
// kWinogradError u times the greatest sum of magnitudes that goes into any element of the call's output.
#pragma once
#include "conv_correlation.hpp"

namespace metafast::kernels::METAFAST_ISA {

inline constexpr double kWinogradError = 8;

// Whether the transforms cost less than the products they save.
template <class T>
bool winograd_suits(const Correlation<T>&) noexcept;
template <class T>
bool winograd_dw_suits(const ConvInts&) noexcept;

// The same contract as conv_fwd and conv_dx, conv_dw (conv.hpp), where it suits.
template <class T>
int winograd_correlate(const Correlation<T>&, const Args&) noexcept;
template <class T>
int winograd_dw(const ConvInts&, const Args&) noexcept;

template <class T>
int64_t winograd_correlate_scratch(const Correlation<T>&) noexcept;
template <class T>
int64_t winograd_dw_scratch(const ConvInts&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
