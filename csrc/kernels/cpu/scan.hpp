// cumsum: y[r] = x[0] + ... + x[r] along the middle of (outer, reduce, inner), dense; from the end where
// `reverse`, y[r] = x[r] + ... + x[reduce - 1], which is the adjoint.
//
// ptr   x, y (y may be x)
// ints  outer, reduce, inner, reverse
// Sums are kept in double: error at most u |y| + 2^-53 reduce sum |x|, u the unit roundoff of T.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

template <class T>
int cumsum(const Args&) noexcept;
extern template int cumsum<float>(const Args&) noexcept;
extern template int cumsum<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
