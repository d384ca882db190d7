// One operation of a cluster on rows of vectors: a loop for each opcode and each pattern of fixed operands. Part of
// pointwise.cpp.
#pragma once
#include "../common/opcodes.hpp"
#include "math.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

// Rows of vectors in memory: `step` elements from vector to vector, 0 for one vector again and again, and
// `pitch` from row to row.
template <class T>
struct View {
  T* p;
  int64_t step, pitch;
};

template <class T, Opcode op>
METAFAST_INLINE Vec<T> apply(Vec<T> a, Vec<T> b, Vec<T> c) {
  const Vec<T> zero{}, one = splat(T(1));
  switch (op) {
    case Opcode::copy:
      return a;
    case Opcode::add:
      return a + b;
    case Opcode::sub:
      return a - b;
    case Opcode::mul:
      return a * b;
    case Opcode::div:
      return a / b;
    case Opcode::neg:
      return -a;
    case Opcode::exp:
      return exp_v(a);
    case Opcode::log:
      return log_v(a);
    case Opcode::sqrt:
      return sqrt_v<T>(a);
    case Opcode::rsqrt:
      return one / sqrt_v<T>(a);
    case Opcode::recip:
      return one / a;
    case Opcode::abs:
      return abs_v<T>(a);
    case Opcode::sign:
      return a > zero ? one : (a < zero ? -one : zero);  // 0 for NaN
    case Opcode::maximum:
      return max_nan<T>(a, b);
    case Opcode::minimum:
      return min_nan<T>(a, b);
    case Opcode::pow:
      return pow_v(a, b);
    case Opcode::tanh:
      return tanh_v(a);
    case Opcode::sigmoid:
      return sigmoid_v(a);
    case Opcode::erf:
      return erf_v(a);
    case Opcode::relu:
      return a <= zero ? zero : a;
    case Opcode::step:
      return a > zero ? one : zero;
    case Opcode::gt:
      return a > b ? one : zero;
    case Opcode::ge:
      return a >= b ? one : zero;
    case Opcode::lt:
      return a < b ? one : zero;
    case Opcode::le:
      return a <= b ? one : zero;
    case Opcode::eq:
      return a == b ? one : zero;
    case Opcode::ne:
      return a != b ? one : zero;
    case Opcode::where:
      return a != zero ? b : c;
    case Opcode::where_positive:
      return a > zero ? b : c;
    case Opcode::softplus:
      return softplus_v(a);
    case Opcode::expm1:
      return expm1_v(a);
    case Opcode::log1p:
      return log1p_v(a);
    case Opcode::sin:
      return sin_v(a);
    case Opcode::cos:
      return cos_v(a);
    case Opcode::fma:
      return fma<T>(a, b, c);
    case Opcode::square:
      return a * a;
    case Opcode::floor:
      return floor_v(a);
    case Opcode::atan:
      return atan_v(a);
    case Opcode::count:
      break;
  }
  return a;
}

// One operation on `rows` rows of n elements; those of dst lie one after the other.
template <class T>
using Loop = void (*)(T* dst, const View<T>& a, const View<T>& b, const View<T>& c, int64_t n,
                      int64_t rows) noexcept;

// Bit j of `fixed`: operand j is one vector all along a row.
template <class T, Opcode op, int arity, int fixed>
void loop(T* dst, const View<T>& a, const View<T>& b, const View<T>& c, int64_t n, int64_t rows) noexcept {
  constexpr int L = kLanes<T>;
  const Vec<T> none{};
  const int64_t rest = n & (L - 1), whole = n - rest;
  const Mask<T> last(rest);
  View<T> x = a, y = b, z = c;  // else the compiler reads these anew after every store
  for (; rows > 0; --rows, dst += n, x.p += x.pitch, y.p += y.pitch, z.p += z.pitch) {
    const Vec<T> x0 = fixed & 1 ? load(x.p) : none, y0 = fixed & 2 ? load(y.p) : none,
                 z0 = fixed & 4 ? load(z.p) : none;
    const auto run = [&](int64_t at, auto lanes) {
      const Vec<T> xs = fixed & 1 ? x0 : load(x.p + at, lanes);
      const Vec<T> ys = fixed & 2 || arity < 2 ? y0 : load(y.p + at, lanes);
      const Vec<T> zs = fixed & 4 || arity < 3 ? z0 : load(z.p + at, lanes);
      store(dst + at, apply<T, op>(xs, ys, zs), lanes);
    };
#pragma GCC unroll 4
    for (int64_t at = 0; at < whole; at += L) run(at, Whole{});
    if (rest) run(whole, last);
  }
}

struct OpcodeArity {
  static constexpr int of[] = {
#define X(name, operands) operands,
      METAFAST_POINTWISE_OPCODES(X)
#undef X
  };
};

template <class T>
struct Loops {
  template <Opcode op, int arity, int fixed>
  static constexpr Loop<T> entry = loop<T, op, arity, fixed & ((1 << arity) - 1)>;
  static constexpr Loop<T> of[][8] = {
#define X(name, n)                                                                  \
  {entry<Opcode::name, n, 0>, entry<Opcode::name, n, 1>, entry<Opcode::name, n, 2>, \
   entry<Opcode::name, n, 3>, entry<Opcode::name, n, 4>, entry<Opcode::name, n, 5>, \
   entry<Opcode::name, n, 6>, entry<Opcode::name, n, 7>},
      METAFAST_POINTWISE_OPCODES(X)
#undef X
  };
  static Loop<T> find(Opcode op, int fixed) { return of[static_cast<int>(op)][fixed]; }
};

template <class T>
void copy(T* dst, const View<T>& from, int64_t n) {
  Loops<T>::find(Opcode::copy, from.step == 0)(dst, from, from, from, n, 1);
}

}  // namespace
}  // namespace metafast::kernels::METAFAST_ISA
