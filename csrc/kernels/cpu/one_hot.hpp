// one_hot  ptr labels(N, stride label_stride), out(N, C) dense   ints N, C, ignore_index, label_stride, real, wraps
//   The labels are int64, or whole numbers of type T where real is 1.   out(n, c) = 1 where c is the label of n, else 0; a row whose label is ignore_index is 0. Where
//   wraps is 1, a label from -C to -1 stands for C more. Any other label outside 0..C-1 makes the call return kLabelOutOfRange; its row is 0.
// fill     ptr out(n)   ints n   float value
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

template <class T>
int one_hot(const Args&) noexcept;
template <class T>
int fill(const Args&) noexcept;
extern template int one_hot<float>(const Args&) noexcept;
extern template int one_hot<double>(const Args&) noexcept;
extern template int fill<float>(const Args&) noexcept;
extern template int fill<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
