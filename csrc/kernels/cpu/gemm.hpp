// gemm: C[b](m, n) = sum_k A[b](m, k) B[b](k, n)  (+ C)  (+ bias[n]),  or D[b](m, n) ± s times that sum; where there is
// a pair, the sum is that of two products, A B + A' B'
//
// ptr   A, B, C, [bias(N)] or [D, s (one number)], [A', B' (which lie as A and B do)]
// ints  batch, M, N, K, a_bs, a_rs, a_cs, b_bs, b_rs, b_cs, c_bs, c_rs, c_cs, mode (0 assigns, 1 adds, 2: D + s A B,
//       3: D - s A B), has_bias (modes 0 and 1), pair
// Any strides (elements), 0 for a shared or broadcast operand; any of batch, M, N, K may be 0 (K = 0 gives
// bias or 0). Fast where n or m lies together in C. D has the strides of C and is C or apart from it. C overlaps neither
// A nor B, and no two of its elements share a place. A batch of a multiple of the vector's lanes that lies together in C, and together or shared in A and
// B, is multiplied lane by lane (lanes.hpp): then any strides are fast. A narrow result whose operands lie together along k is made of dot products along k, any
// other of tiles; which one depends on the sizes alone. The error of an element is at most what the rows of
// matmul and matmul_lanes (metafast/ops/contract.py) state: C takes up partial sums of 192 terms,
// of each product of a pair.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

template <class T>
int gemm(const Args&) noexcept;
template <class T>
int64_t gemm_scratch(const int64_t* ints) noexcept;
// Which tiles, whether turned, packed or staged: decided once a program.
template <class T>
int64_t gemm_prepared_bytes(const int64_t* ints) noexcept;
template <class T>
void gemm_prepare(const int64_t* ints, const double* floats, std::byte* place) noexcept;
// B (A where turned) in strips, where a call would pack it.
template <class T>
Keeping gemm_keeps(const int64_t* ints) noexcept;
template <class T>
void gemm_keep(const Args&) noexcept;

extern template int gemm<float>(const Args&) noexcept;
extern template int gemm<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
