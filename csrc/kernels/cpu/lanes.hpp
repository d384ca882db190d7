// The product of matrices whose elements are vectors: element (m, k) of A stands for one number of each of `batch`
// matrices, which lie together. C(m, n) (+)= sum_k A(m, k) * B(k, n), lane by lane, or the sum of two such products.
//
// Strides count elements; those of rows and columns are any. A lane stride of 0 (A, B) is one matrix that all
// share. Rows and columns need no order and nothing is packed: every step along k loads `rows + columns` vectors and
// does `rows * columns` fma on accumulators that stay in registers.
#pragma once
#include "cut.hpp"

namespace metafast::kernels::METAFAST_ISA {

template <class T>
struct LaneMatrix {
  T* p;
  int64_t rs, cs;
  bool lanes;  // or one number for all
};

template <class T>
struct LaneProduct {
  int64_t M, N, K;
  LaneMatrix<const T> A, B;
  LaneMatrix<T> C;
  const T *more_a, *more_b;  // those of the second product, which lie as the first's do; or null
  bool
      add;  // C = E + scale * product instead of C = product, where E lies as C does, `from` elements behind it
  int64_t from;
  T scale;
  int64_t columns;  // of a block of accumulators, as lane_width says
  bool apart;       // one product after the other, as lanes_apart says
};

// The best width of blocks for a product of M × N. The transposed product may load less.
template <class T>
Width lane_width(int64_t M, int64_t N) noexcept;

// Whether two such products are better done one after the other, since their left factors do not lie in a first-level
// cache together: C, no larger than one of those, goes there twice then rather than they for each strip.
bool lanes_apart(int64_t M, int64_t N, int64_t K) noexcept;

// One vector of lanes of the product; at least one of A and B has lanes.
template <class T>
void multiply_lanes(const LaneProduct<T>&) noexcept;

extern template Width lane_width<float>(int64_t, int64_t) noexcept;
extern template Width lane_width<double>(int64_t, int64_t) noexcept;
extern template void multiply_lanes<float>(const LaneProduct<float>&) noexcept;
extern template void multiply_lanes<double>(const LaneProduct<double>&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
