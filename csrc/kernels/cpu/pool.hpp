// Pooling over channels-last images.
//
//   max_pool      ptr x(N,H,W,C), y(N,OH,OW,C), idx    ints N, H, W, C, KH, KW, sh, sw, ph, pw, dh, dw, OH,
//   OW
//     idx(n,oh,ow,c) = h * W + w (int32) of the winner: the first maximum in row-major order of the window; a
//     NaN wins, the last one where there are several (PyTorch's scan). Padding never wins.
//   pool_gather   ptr x(N,H,W,C), idx(N,OH,OW,C), y    ints N, H, W, C, OH, OW          y = x at the winners
//   pool_scatter  ptr dy(N,OH,OW,C), idx, dx(N,H,W,C)  ints N, H, W, C, OH, OW, mode    dx (+)= dy at the
//   winners avg_pool      ptr x(N,H,W,C), y(N,OH,OW,C)         ints N, H, W, C, KH, KW, sh, sw, ph, pw, OH,
//   OW, avg_pool_adj  ptr dy(N,OH,OW,C), dx(N,H,W,C)            count_include_pad, divisor_override (0:
//   none), mode
//     y = window's sum / divisor, and its adjoint. The divisor is the window's size, as clipped to the padded
//     image (count_include_pad) or to the image, or divisor_override.
// All dense; outputs overlap no input; idx is exact, avg_pool within (KH KW + 1) u of the window's mean
// magnitude.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

#define METAFAST_DECLARE(name)                           \
  template <class T>                                     \
  int name(const Args&) noexcept;                        \
  extern template int name<float>(const Args&) noexcept; \
  extern template int name<double>(const Args&) noexcept;
METAFAST_DECLARE(max_pool)
METAFAST_DECLARE(pool_gather)
METAFAST_DECLARE(pool_scatter)
METAFAST_DECLARE(avg_pool)
METAFAST_DECLARE(avg_pool_adj)
#undef METAFAST_DECLARE

}  // namespace metafast::kernels::METAFAST_ISA
