// Normalisation over the middle of (outer, reduce, inner), dense: BatchNorm of channels-last images is (1, N
// H W, C), LayerNorm (rows, features, 1). mean_r is the mean over `reduce`.
//
//   standardize      ptr x, xhat, rstd, mean, var             ints outer, reduce, inner        float eps
//     mean = mean_r(x), var = mean_r((x - mean)^2), rstd = 1 / sqrt(var + eps), xhat = (x - mean) rstd
//   moments          ptr x, mean, var                         ints outer, reduce, inner
//     the first two of these, of each of `outer` pieces of x
//   join_moments     ptr means, vars, rstd, mean, var         ints outer, reduce, inner        float eps
//     the same of `reduce` pieces together, all of one size: var = mean_r(vars) + mean_r((means - mean)^2)
//   project          ptr v, xhat, rstd, out, corr             ints outer, reduce, inner, mode
//     corr = mean_r(v xhat),  out (+)= p,  p = rstd (v - mean_r(v) - xhat corr)
//     (the derivative of xhat in x, which is symmetric, applied to v)
//   project_tangent  ptr v, xhat, xhat_dot, rstd, corr_dot, out   ints outer, reduce, inner, mode
//     out (+)= -rstd corr_dot p - rstd (xhat_dot mean_r(v xhat) + xhat mean_r(v xhat_dot))
//     (the derivative of p along xdot for fixed v, where xhat_dot = project(xdot) and
//      corr_dot = mean_r(xdot xhat))
//
// x, v, xhat, xhat_dot, out (outer, reduce, inner); rstd, mean, var, corr, corr_dot (outer, inner).
// xhat may be x, and out may be v. Sums as in sums.hpp. Where inner > 1, rows are read whole, and mean and
// variance come from one pass over memory: chunks of 128 rows about their own means, put together pairwise;
// as exact as two passes. Where inner = 1 it is two passes.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

#define METAFAST_DECLARE(name)                           \
  template <class T>                                     \
  int name(const Args&) noexcept;                        \
  extern template int name<float>(const Args&) noexcept; \
  extern template int name<double>(const Args&) noexcept;
METAFAST_DECLARE(standardize)
METAFAST_DECLARE(moments)
METAFAST_DECLARE(join_moments)
METAFAST_DECLARE(project)
METAFAST_DECLARE(project_tangent)
#undef METAFAST_DECLARE

}  // namespace metafast::kernels::METAFAST_ISA
