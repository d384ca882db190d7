// Elementary functions of vectors.
//
// float: polynomials on a reduced argument (least-maximum fits to 2^-28 or better before rounding); error at
// most 2 ulp for exp, log, log1p, expm1, erf, sin, cos, atan and 4 ulp for tanh, sigmoid, softplus where the result
// is a normal number; sin and cos of |x| > 8192 and pow go through the C library lane by lane. double: the C
// library. Special values (zeros with their sign, infinities, NaN, domain errors) as in the C library.
#pragma once
#include "vec.hpp"

extern "C" {
double exp(double) noexcept;
double log(double) noexcept;
double expm1(double) noexcept;
double log1p(double) noexcept;
double atan(double) noexcept;
double tanh(double) noexcept;
double erf(double) noexcept;
double sin(double) noexcept;
double cos(double) noexcept;
double pow(double, double) noexcept;
double floor(double) noexcept;
float sinf(float) noexcept;
float cosf(float) noexcept;
float powf(float, float) noexcept;
float floorf(float) noexcept;
}

namespace metafast::kernels::METAFAST_ISA {

template <class T>
METAFAST_INLINE Vec<T> abs_v(Vec<T> x) {
  using Word = decltype(Bits<T>{}[0] + 0);
  constexpr Word magnitude = static_cast<Word>(sizeof(T) == 4 ? 0x7fffffffll : 0x7fffffffffffffffll);
  return from_bits<T>(bits_of<T>(x) & (magnitude - Bits<T>{}));
}

template <class T>
METAFAST_INLINE Vec<T> copysign_v(Vec<T> magnitude, Vec<T> sign) {
  const Bits<T> top = bits_of<T>(splat<T>(T(-0.0)));
  return from_bits<T>((bits_of<T>(magnitude) & ~top) | (bits_of<T>(sign) & top));
}

template <class T, class F>
METAFAST_INLINE Vec<T> by_lane(Vec<T> x, F f) {
  Vec<T> y{};
  for (int i = 0; i < kLanes<T>; ++i) y[i] = static_cast<T>(f(x[i]));
  return y;
}

template <class T>
METAFAST_INLINE Vec<T> sqrt_v(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_sqrt_ps(0xffff, x);
  else
    return _mm512_maskz_sqrt_pd(0xff, x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return _mm256_sqrt_ps(x);
  else
    return _mm256_sqrt_pd(x);
#else
  return by_lane<T>(x, [](T v) { return sizeof(T) == 4 ? __builtin_sqrtf(v) : __builtin_sqrt(v); });
#endif
}

// a - b modulo 2^32: the bits of NaN, infinities and negative numbers may be that far from b.
METAFAST_INLINE Bits<float> wrapping_difference(Bits<float> a, Bits<float> b) {
  typedef uint32_t Words __attribute__((vector_size(kVecBytes)));
  return reinterpret_cast<Bits<float>>(reinterpret_cast<Words>(a) - reinterpret_cast<Words>(b));
}

// Rounded to the nearest integer, as a float and as bits; |x| < 2^22.
struct Nearest {
  Vec<float> value;
  Bits<float> integer;
};
METAFAST_INLINE Nearest nearest(Vec<float> x) {
  const Vec<float> shift = splat(12582912.0f);  // 1.5 * 2^23
  const Vec<float> shifted = x + shift;
  return {shifted - shift, wrapping_difference(bits_of<float>(shifted), bits_of<float>(shift))};
}

METAFAST_INLINE Vec<float> pow2(Bits<float> n) {
  return from_bits<float>((n + 127) << 23);
}  // -127 < n < 128

METAFAST_INLINE Vec<float> clamp(Vec<float> x, float lo, float hi) {
  x = x < lo ? splat(lo) : x;
  return x > hi ? splat(hi) : x;
}

constexpr float kLog2e = 1.44269504f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;

METAFAST_INLINE Vec<float> exp_v(Vec<float> x) {
  x = clamp(x, -105.0f, 89.0f);
  const Nearest n = nearest(x * kLog2e);
  const Vec<float> r = (x - n.value * kLn2Hi) - n.value * kLn2Lo;
  Vec<float> q = splat(0.00139517174f);
  q = q * r + 0.00836959854f;
  q = q * r + 0.0416661873f;
  q = q * r + 0.166665122f;
  q = q * r + 0.5f;
  const Vec<float> p = (q * r) * r + r + 1.0f;
  const Bits<float> half = n.integer >> 1;  // in two factors: 2^n itself may leave the range
  return (p * pow2(half)) * pow2(n.integer - half);
}

METAFAST_INLINE Vec<float> expm1_v(Vec<float> x) {
  x = clamp(x, -30.0f, 89.0f);
  const Nearest n = nearest(x * kLog2e);
  const Vec<float> r = (x - n.value * kLn2Hi) - n.value * kLn2Lo;
  Vec<float> q = splat(0.000199150309f);
  q = q * r + 0.00139420596f;
  q = q * r + 0.00833327137f;
  q = q * r + 0.0416663401f;
  q = q * r + 0.166666672f;
  q = q * r + 0.5f;
  const Vec<float> p = (q * r) * r + r;
  const Bits<float> half = n.integer >> 1;
  const Vec<float> s = pow2(half), t = pow2(n.integer - half);
  const Vec<float> y = ((p * s) * t) + (s * t - 1.0f);
  return n.integer == 0 ? (x == 0.0f ? x : p) : (n.integer > 126 ? (p * s + s) * t : y);
}

METAFAST_INLINE Vec<float> log_v(Vec<float> x) {
  const Bits<float> tiny = x < 1.17549435e-38f;
  const Vec<float> scaled = tiny ? x * 8388608.0f : x;
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2))
  const Bits<float> b = wrapping_difference(bits_of<float>(scaled), 0x3f3504f3 - Bits<float>{});
  const Bits<float> e = (b >> 23) + (tiny & -23);
  const Vec<float> m = from_bits<float>((b & 0x007fffff) + 0x3f3504f3);
  const Vec<float> f = m - 1.0f, ef = __builtin_convertvector(e, Vec<float>);
  Vec<float> p = splat(0.0691536814f);
  p = p * f - 0.117898077f;
  p = p * f + 0.118729763f;
  p = p * f - 0.123843484f;
  p = p * f + 0.142186582f;
  p = p * f - 0.16669251f;
  p = p * f + 0.200022265f;
  p = p * f - 0.249999866f;
  p = p * f + 0.333333105f;
  const Vec<float> f2 = f * f;
  Vec<float> y = ((p * f) * f2 + ef * kLn2Lo) - 0.5f * f2;
  y = (y + f) + ef * kLn2Hi;
  const Vec<float> infinity = splat(__builtin_inff());
  y = x == infinity ? x : y;
  y = x == 0.0f ? -infinity : y;
  return (x < 0.0f) | (x != x) ? splat(__builtin_nanf("")) : y;
}

// log(u) corrected for what u = 1 + x lost.
METAFAST_INLINE Vec<float> log1p_v(Vec<float> x) {
  const Vec<float> u = 1.0f + x;
  const Vec<float> l = log_v(u);
  const Bits<float> plain = (u == 0.0f) | (u == __builtin_inff());
  return x == 0.0f ? x : (plain ? l : l - ((u - 1.0f) - x) / u);
}

METAFAST_INLINE Vec<float> tanh_v(Vec<float> x) {
  const Vec<float> a = abs_v<float>(x);
  const Vec<float> e = expm1_v(2.0f * (a > 10.0f ? splat(10.0f) : a));
  const Vec<float> y = copysign_v<float>(e / (e + 2.0f), x);
  return x == 0.0f ? x : y;
}

METAFAST_INLINE Vec<float> sigmoid_v(Vec<float> x) {
  const Vec<float> e = exp_v(-abs_v<float>(x));
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

METAFAST_INLINE Vec<float> erf_v(Vec<float> x) {
  const Vec<float> a = abs_v<float>(x), s = x * x;
  Vec<float> p = splat(7.88928592e-05f);  // erf(x) = x + x P(x^2) on |x| < 1
  p = p * s - 0.000802089518f;
  p = p * s + 0.00518954219f;
  p = p * s - 0.026854448f;
  p = p * s + 0.112836003f;
  p = p * s - 0.37612626f;
  p = p * s + 0.128379166f;
  const Vec<float> small = x * p + x;
  const Vec<float> t = a > 4.0f ? splat(4.0f) : a;
  Vec<float> q = splat(1.38427686e-05f);  // erf(t) = 1 - exp(-t Q(t)) on [1, 4]
  q = q * t - 0.00034931142f;
  q = q * t + 0.0037518905f;
  q = q * t - 0.0239973515f;
  q = q * t + 0.106514931f;
  q = q * t + 0.634979963f;
  q = q * t + 1.12869155f;
  const Vec<float> large = copysign_v<float>(1.0f - exp_v(-t * q), x);
  return a < 1.0f ? small : large;
}

METAFAST_INLINE Vec<float> softplus_v(Vec<float> x) {
  return (x > 0.0f ? x : splat(0.0f)) + log1p_v(exp_v(-abs_v<float>(x)));
}

// quarter 0: sine, 1: cosine. The argument is reduced by multiples of pi/2 in three pieces.
METAFAST_INLINE Vec<float> sine(Vec<float> x, int quarter) {
  const Vec<float> a = abs_v<float>(x);
  const Bits<float> far = ~(a <= 8192.0f);
  const Nearest n = nearest((far ? splat(0.0f) : x) * 0.636619772f);
  Vec<float> r = x - n.value * 1.5703125f;
  r = r - n.value * 4.83751297e-4f;
  r = r - n.value * 7.54978942e-8f;
  const Bits<float> k = n.integer + quarter;
  const Vec<float> s = r * r;
  const Vec<float> sin_r =
      r + (r * s) * (-0.166666672f + s * (0.00833332911f + s * (-0.000198391761f + s * 2.71681029e-06f)));
  const Vec<float> cos_r =
      (1.0f - 0.5f * s) +
      (s * s) * (0.0416666679f + s * (-0.00138888834f + s * (2.47993503e-05f - s * 2.71963046e-07f)));
  Vec<float> y = (k & 1) != 0 ? cos_r : sin_r;
  y = (k & 2) != 0 ? -y : y;
  int any = 0;
  for (int i = 0; i < kLanes<float>; ++i) any |= far[i];
  if (any)
    for (int i = 0; i < kLanes<float>; ++i)
      if (far[i]) y[i] = quarter ? cosf(x[i]) : sinf(x[i]);
  return quarter ? y : (x == 0.0f ? x : y);
}
METAFAST_INLINE Vec<float> sin_v(Vec<float> x) { return sine(x, 0); }
METAFAST_INLINE Vec<float> cos_v(Vec<float> x) { return sine(x, 1); }

// atan x = pi/4 i + atan r with i = 0, 1 (r = (x - 1)/(x + 1)) or 2 (r = -1/x), so that |r| <= tan(pi/8).
METAFAST_INLINE Vec<float> atan_v(Vec<float> x) {
  const Vec<float> a = abs_v<float>(x);
  const Bits<float> large = a > 2.41421356f, middle = a > 0.414213562f;
  const Vec<float> r = large ? -1.0f / a : (middle ? (a - 1.0f) / (a + 1.0f) : a), s = r * r;
  Vec<float> p = splat(0.0805374450f);  // Cephes' atanf
  p = p * s - 0.138776856f;
  p = p * s + 0.199777106f;
  p = p * s - 0.333329492f;
  const Vec<float> zero{};
  const Vec<float> hi = large ? splat(1.57079637f) : (middle ? splat(0.785398185f) : zero);
  const Vec<float> lo = large ? splat(-4.37113883e-8f) : (middle ? splat(-2.18556941e-8f) : zero);
  return copysign_v<float>(hi + (r + ((p * s) * r + lo)), x);
}

METAFAST_INLINE Vec<float> floor_v(Vec<float> x) { return by_lane<float>(x, floorf); }
METAFAST_INLINE Vec<float> pow_v(Vec<float> x, Vec<float> y) {
  for (int i = 0; i < kLanes<float>; ++i) x[i] = powf(x[i], y[i]);
  return x;
}

METAFAST_INLINE Vec<double> exp_v(Vec<double> x) { return by_lane<double>(x, ::exp); }
METAFAST_INLINE Vec<double> expm1_v(Vec<double> x) { return by_lane<double>(x, ::expm1); }
METAFAST_INLINE Vec<double> log_v(Vec<double> x) { return by_lane<double>(x, ::log); }
METAFAST_INLINE Vec<double> log1p_v(Vec<double> x) { return by_lane<double>(x, ::log1p); }
METAFAST_INLINE Vec<double> tanh_v(Vec<double> x) { return by_lane<double>(x, ::tanh); }
METAFAST_INLINE Vec<double> erf_v(Vec<double> x) { return by_lane<double>(x, ::erf); }
METAFAST_INLINE Vec<double> sin_v(Vec<double> x) { return by_lane<double>(x, ::sin); }
METAFAST_INLINE Vec<double> cos_v(Vec<double> x) { return by_lane<double>(x, ::cos); }
METAFAST_INLINE Vec<double> atan_v(Vec<double> x) { return by_lane<double>(x, ::atan); }
METAFAST_INLINE Vec<double> floor_v(Vec<double> x) { return by_lane<double>(x, ::floor); }
METAFAST_INLINE Vec<double> sigmoid_v(Vec<double> x) {
  const Vec<double> e = exp_v(-abs_v<double>(x));
  return (x < 0.0 ? e : splat(1.0)) / (1.0 + e);
}
METAFAST_INLINE Vec<double> softplus_v(Vec<double> x) {
  return (x > 0.0 ? x : splat(0.0)) + log1p_v(exp_v(-abs_v<double>(x)));
}
METAFAST_INLINE Vec<double> pow_v(Vec<double> x, Vec<double> y) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::pow(x[i], y[i]);
  return x;
}

}  // namespace metafast::kernels::METAFAST_ISA
