// A product element by element, as dot products along k, which lies together in A and in B: C(m, n) (+)= sum_k
// A(m, k) B(k, n) (+ bias[n]). Nothing is packed and B is read once, in order, where M is small.
//
// Lane l of an element's accumulator takes up every kLanes-th term, in order; the lanes are added by halves.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

// Rows and columns of the blocks whose accumulators stay in registers.
struct DotShape {
  int64_t rows, columns;
};

template <class T>
DotShape dot_shape(int64_t M, int64_t N, int64_t K) noexcept;

template <class T>
struct DotProduct {
  DotShape shape;
  int64_t M, N, K;
  const T* a;
  int64_t a_rs;
  const T* b;
  int64_t b_cs;
  T* c;
  int64_t c_rs, c_cs;
  const T* bias;  // of the columns, or null
  bool add;       // C = E + scale * sum instead of C = sum, where E lies as C does, `from` elements behind it
  int64_t from;
  T scale;
};

template <class T>
void multiply_dots(const DotProduct<T>&) noexcept;

extern template void multiply_dots<float>(const DotProduct<float>&) noexcept;
extern template void multiply_dots<double>(const DotProduct<double>&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
