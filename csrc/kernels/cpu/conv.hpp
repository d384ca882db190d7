// Convolutions over channels-last images, with any kernel, stride, padding and dilation.
//
//   conv_fwd  y(n, oh, ow, o) = sum x(n, oh sh - ph + kh dh, ow sw - pw + kw dw, c) w(o, c, kh, kw)
//             (+ bias[o])
//   conv_dx   dx = the gradient of <y, dy> in x          conv_dw  dw = the gradient of <y, dy> in w
//
// ptr   conv_fwd: x, w, y, [bias(O)]   conv_dx: dy, w, dx   conv_dw: x, dy, dw
//       x, dx (N, H, W, C), y, dy (N, OH, OW, O) dense; w, dw with strides w_so, w_sc, w_skh, w_skw
// ints  N, H, W, C, O, KH, KW, sh, sw, ph, pw, dh, dw, OH, OW, w_so, w_sc, w_skh, w_skw, mode (0 assigns,
//       1 adds), winograd (1: in float, where it pays, by Winograd's form, of both axes or down the columns; 2: by that of
//       both, and w is what winograd_filters made of it), has_bias (of conv_dw: pieces)
//
// conv_dw makes one dw of all images, or one of each of so many `pieces`, shares of them (of rows of tiles in Winograd's
// form), which lie one behind the other, O C KH KW elements apart: then threads need not all read all of dy.
// winograd_filters  ptr w, filters   ints those of conv_fwd, adjoint (1: for conv_dx); float only
// Outputs overlap no input. Fast for any weight layout in which o, c or the taps lie together. The error of
// an element of n terms (n = KH KW C, KH KW O, N OH OW) is at most what the rows of metafast/ops/contract.py state for
// "direct", and for Winograd's forms for "winograd" and "winograd down".
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

#define METAFAST_DECLARE(name)                           \
  template <class T>                                     \
  int name(const Args&) noexcept;                        \
  template <class T>                                     \
  int64_t name##_scratch(const int64_t* ints) noexcept;  \
  extern template int name<float>(const Args&) noexcept; \
  extern template int name<double>(const Args&) noexcept;
METAFAST_DECLARE(conv_fwd)
METAFAST_DECLARE(conv_dx)
METAFAST_DECLARE(conv_dw)
METAFAST_DECLARE(winograd_filters)
#undef METAFAST_DECLARE

}  // namespace metafast::kernels::METAFAST_ISA
