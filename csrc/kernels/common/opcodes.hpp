// Operations of the `pointwise` kernel, in one list: the enum, the names and the interpreter are made from
// it.
#pragma once

// X(name, operands)
// clang-format off
#define METAFAST_POINTWISE_OPCODES(X) \
  X(copy, 1) X(add, 2) X(sub, 2) X(mul, 2) X(div, 2) X(neg, 1) X(exp, 1) X(log, 1) X(sqrt, 1) X(rsqrt, 1) \
  X(recip, 1) X(abs, 1) X(sign, 1) X(maximum, 2) X(minimum, 2) X(pow, 2) X(tanh, 1) X(sigmoid, 1) X(erf, 1) \
  X(relu, 1) X(step, 1) X(gt, 2) X(ge, 2) X(lt, 2) X(le, 2) X(eq, 2) X(ne, 2) X(where, 3) X(softplus, 1) \
  X(where_positive, 3) X(expm1, 1) X(log1p, 1) X(sin, 1) X(cos, 1) X(fma, 3) X(square, 1) X(floor, 1) X(atan, 1)
// clang-format on

namespace metafast::kernels {

enum class Opcode : int {
#define X(name, operands) name,
  METAFAST_POINTWISE_OPCODES(X)  //
#undef X
  count
};

}  // namespace metafast::kernels
