// log_softmax: y = x - max_r(x) - log(sum_r exp(x - max_r(x))) over the middle of (outer, reduce, inner),
// dense.
//
// ptr   x, y (y may be x)
// ints  outer, reduce, inner
// A row with +inf or NaN, or of -inf alone, gives NaN, as in PyTorch. Error at most 8 u (1 + |y| + |x -
// max|), and u the unit roundoff; the sum is one chain over `reduce` in each of a vector's lanes.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

template <class T>
int log_softmax(const Args&) noexcept;
extern template int log_softmax<float>(const Args&) noexcept;
extern template int log_softmax<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
