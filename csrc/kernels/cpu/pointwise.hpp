// pointwise: a program of elementwise operations over one index space, in one pass over memory.
//
// ptr   in[0..n_in), out[0..n_out)
// ints  rank, n_in, n_out, n_ops, n_regs, dims[rank] (outermost first), in_strides[n_in][rank],
//       out_strides[n_out][rank], out_reg[n_out], out_mode[n_out] (0 assigns, 1 adds; 2 and 3: of a sum),
//       ops[n_ops][5] = opcode, dst, a, b, c; a source r < 0 is the immediate f[-1-r]; registers 0..n_in-1
//       are the inputs; compiled: whether it may become machine code
// Any strides, 0 to broadcast an input; sizes within the kPointwise* limits of kernel.hpp. An output may be
// an input with the same strides, unless the register of a later output is that input; outputs do not overlap each
// other.
// A sum (mode 2, 3) adds up over the dimensions in which its stride is 0; with unit dimensions dropped and
// neighbours merged, all its strides are 0 but that of the last dimension, 0 or 1. Of nothing it is 0. A call with a
// sum is not split: part 0 does it all.
// Prepared once from ints and immediates: the merged index space, how each operand is reached, the loops to
// call and the immediates as vectors. A call only fills in addresses.
// Operations that are few instructions each become machine code on x86 (../code/cluster.hpp): one pass over memory,
// everything between in registers. Else blocks of some hundred elements run through all operations, one after the
// other, while they lie in L1. Both round alike.
// Accuracy: one rounding an arithmetic operation (fma: one in all where the set has it); functions as in
// math.hpp; a sum within (64 block / m + blocks / 64) u times the sum of magnitudes, m the lanes of a
// vector or, of sums over rows, the elements of one.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

template <class T>
int pointwise(const Args&) noexcept;
template <class T>
int64_t pointwise_scratch(const int64_t* ints) noexcept;
template <class T>
int64_t pointwise_prepared_bytes(const int64_t* ints) noexcept;
template <class T>
void pointwise_prepare(const int64_t* ints, const double* f, std::byte* place) noexcept;

extern template int pointwise<float>(const Args&) noexcept;
extern template int pointwise<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
