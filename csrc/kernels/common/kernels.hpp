// The catalogue of native kernels: look one up by name, element type and instruction set.
//
// T is the element type (float or double); "dense" is contiguous in the order listed; booleans are 0/1 values
// of T; indices of pools are int32, labels int64. `mode` 0 assigns, 1 adds to what the output holds. NaN and
// Inf propagate as in PyTorch. Outputs never overlap inputs unless the row says so. Each row: operands | ints
// | floats.
//
//   pointwise        in[n_in], out[n_out] | rank, n_in, n_out, n_ops, n_regs, dims[rank],
//                    in_strides[n_in][rank], out_strides[n_out][rank], out_reg[n_out], out_mode[n_out],
//                    ops[n_ops][5] = opcode, dst, a, b, c, compiled | immediates
//   reduce           in, out | nk, nr, kdims[nk], rdims[nr], in_kstrides[nk], in_rstrides[nr],
//                    out_kstrides[nk], mode, kind (0 sum, 1 max) | scale
//   gemm             A, B, C, [bias] or [D, s], [A', B'] | batch, M, N, K, a_bs, a_rs, a_cs, b_bs, b_rs, b_cs, c_bs,
//                    c_rs, c_cs, mode (also 2: D + s A B, 3: D - s A B), has_bias, pair (A B + A' B')
//   conv_fwd         x(N,H,W,C), w, y(N,OH,OW,O), [bias(O)] | N, H, W, C, O, KH, KW, sh, sw, ph, pw, dh, dw,
//                    OH, OW, w_so, w_sc, w_skh, w_skw, mode, winograd, has_bias
//                    (winograd 2: w is what winograd_filters made)
//   conv_dx          dy, w, dx | the same
//   conv_dw          x, dy, dw | the same, with `pieces` for has_bias (more than 1: dw has a dim more, outermost, and
//                    is of a share of the images in each)
//   winograd_filters w, filters | those of conv_fwd, adjoint (1: of conv_dx)
//   standardize      x, xhat, rstd, mean, var | outer, reduce, inner | eps
//   moments          x, mean, var | outer, reduce, inner
//   join_moments     means, vars, rstd, mean, var | outer, reduce, inner | eps
//   project          v, xhat, rstd, out, corr | outer, reduce, inner, mode
//   project_tangent  v, xhat, xhat_dot, rstd, corr_dot, out | outer, reduce, inner, mode
//   log_softmax      x, y | outer, reduce, inner
//   max_pool         x, y, idx, [sign(C)] | N, H, W, C, KH, KW, sh, sw, ph, pw, dh, dw, OH, OW, has_sign
//   pool_gather      x(N,H,W,C), idx(N,OH,OW,C), y | N, H, W, C, OH, OW
//   pool_scatter     dy, idx, dx | N, H, W, C, OH, OW, mode
//   avg_pool         x, y | N, H, W, C, KH, KW, sh, sw, ph, pw, OH, OW, count_include_pad,
//                    divisor_override (0 none), mode
//   avg_pool_adj     dy, dx | the same
//   one_hot          labels, out(N,C) | N, C, ignore_index, label_stride, real (labels: 0 int64, 1 T)
//   fill             out | n | value
//   cumsum           x, y | outer, reduce, inner, reverse
//
// The header of each family (cpu/<family>.hpp) has the formula, what may alias, and the error bound.
#pragma once
#include <string_view>

#include "kernel.hpp"

namespace metafast::kernels {

struct KernelTable {
  const Kernel* rows;
  int count;
  const Kernel* begin() const noexcept { return rows; }
  const Kernel* end() const noexcept { return rows + count; }
};

// All kernels of one element type and instruction set, in the order above; empty where the build lacks the
// set.
KernelTable kernels(DType, Isa) noexcept;

// The kernel called `name`, or nullptr where there is none.
const Kernel* find_kernel(std::string_view name, DType, Isa) noexcept;

// The widest instruction set of both this build and this processor; METAFAST_ISA=baseline|avx2|avx512 lowers
// it.
Isa best_isa() noexcept;

// Whether this build holds kernels for the set and the processor (and its operating system) runs them.
bool isa_available(Isa) noexcept;

inline constexpr int kIsaCount = 3;
int vector_bytes(Isa) noexcept;
const char* isa_name(Isa) noexcept;                            // "baseline", "avx2", "avx512"
bool isa_from_name(std::string_view name, Isa* isa) noexcept;  // false where the name is none of these

// Opcodes of `pointwise`: names in the order of their numbers.
int pointwise_opcode_count() noexcept;
const char* pointwise_opcode_name(int opcode) noexcept;
int pointwise_opcode_arity(int opcode) noexcept;  // how many of the operands a, b, c it reads

// How many operands (ptr), ints and floats a call of this kernel takes given the ints, so that a program can
// be validated before it runs. False where the ints are too few or make no sense.
struct Arity {
  int64_t ptrs, ints;
  int64_t floats;  // the least number
};
bool kernel_arity(std::string_view name, const int64_t* ints, int64_t n_ints, Arity* arity) noexcept;

}  // namespace metafast::kernels
