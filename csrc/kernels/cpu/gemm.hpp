// gemm: C[b](m, n) = sum_k A[b](m, k) B[b](k, n)  (+ C)  (+ bias[n])
//
// ptr   A, B, C, [bias(N)]
// ints  batch, M, N, K, a_bs, a_rs, a_cs, b_bs, b_rs, b_cs, c_bs, c_rs, c_cs, mode (0 assigns, 1 adds),
//       has_bias
// Any strides (elements), 0 for a shared or broadcast operand; any of batch, M, N, K may be 0 (K = 0 gives
// bias or 0). Fast where n or m lies together in C. C overlaps neither A nor B, and no two of its elements
// share a place. Error of an element: at most (K + 2) u sum_k |A(m, k) B(k, n)|, u the unit roundoff.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

template <class T>
int gemm(const Args&) noexcept;
template <class T>
int64_t gemm_scratch(const int64_t* ints) noexcept;

extern template int gemm<float>(const Args&) noexcept;
extern template int gemm<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
