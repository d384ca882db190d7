// reduce: out[k] (+)= scale * sum over r of in[k, r], or the maximum over r (NaN where one is among them).
//
// ptr    in, out
// ints   nk, nr, kdims[nk], rdims[nr], in_kstrides[nk], in_rstrides[nr], out_kstrides[nk],
//        mode (0 assigns, 1 adds), kind (0 sum, 1 max)
// float  scale
// Any strides, at most 8 kept and 8 reduced dimensions; fast where a kept or a reduced dimension lies
// together. The sum over nothing is 0, the maximum -inf. `out` does not overlap `in`. Error of a sum of n
// terms: at most (kChunk / 4 + log2(n) + 5) u sum |term| (sums.hpp).
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

template <class T>
int reduce(const Args&) noexcept;
extern template int reduce<float>(const Args&) noexcept;
extern template int reduce<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
