// Pooling over channels-last images; operands | ints.
//
//   max_pool      x(N,H,W,C), y(N,OH,OW,C), idx, [sign(C)] | N, H, W, C, KH, KW, sh, sw, ph, pw, dh, dw, OH, OW,
//                                                            has_sign
//     idx(n,oh,ow,c) = h * W + w (int32) of the winner: the first maximum, of x or of sign x, in row-major order
//     of the window; a NaN wins, the last one where there are several (PyTorch's scan). Padding never wins.
//     y = x at the winners.
//   pool_gather   x(N,H,W,C), idx(N,OH,OW,C), y | N, H, W, C, OH, OW
//     y = x at the winners
//   pool_scatter  dy(N,OH,OW,C), idx, dx(N,H,W,C) | N, H, W, C, OH, OW, mode
//     dx (+)= dy at the winners
//   avg_pool      x(N,H,W,C), y(N,OH,OW,C) | N, H, W, C, KH, KW, sh, sw, ph, pw, OH, OW, count_include_pad,
//   avg_pool_adj  dy(N,OH,OW,C), dx(N,H,W,C)    divisor_override (0: none), mode
//     y = window's sum / divisor, and its adjoint. The divisor is the window's size, as clipped to the padded
//     image (count_include_pad) or to the image, or divisor_override.
// Where the sizes are those of 2 x 2 windows at stride 2 and the winners lie in them (seen from idx on the way,
// another path takes over where they do not), pool_gather and pool_scatter work on vectors of channels and
// pool_scatter writes each element once.
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
