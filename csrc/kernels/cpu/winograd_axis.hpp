// F(4, 3) along one axis: the points, and the transforms to them and from them of inputs, filters and results.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

using V = Vec<float>;

inline constexpr int kAxis = 6;  // points of an axis: ∞, 0, a, −a, b, −b

// Near the points of least error among those of few digits, by experiment: half that of ±1, ±2.
inline constexpr double kA = 0.6875, kB = 1.5;
inline constexpr double kAA = kA * kA, kBB = kB * kB;

METAFAST_INLINE V constant(double x) { return splat(static_cast<float>(x)); }

// Bᵀ d: d read as coefficients, its products with the polynomials that vanish at all points but one.
METAFAST_INLINE void to_points(const V (&d)[kAxis], V (&v)[kAxis]) {
  const V sum = constant(-(kAA + kBB)), product = constant(kAA * kBB);
  const V even_a = fma<float>(constant(-kBB), d[2], d[4]), odd_a = fma<float>(constant(-kBB), d[1], d[3]);
  const V even_b = fma<float>(constant(-kAA), d[2], d[4]), odd_b = fma<float>(constant(-kAA), d[1], d[3]);
  v[0] = fma<float>(product, d[1], fma<float>(sum, d[3], d[5]));
  v[1] = fma<float>(product, d[0], fma<float>(sum, d[2], d[4]));
  v[2] = fma<float>(constant(kA), odd_a, even_a), v[3] = fma<float>(constant(kA), -odd_a, even_a);
  v[4] = fma<float>(constant(kB), odd_b, even_b), v[5] = fma<float>(constant(kB), -odd_b, even_b);
}

// Aᵀ m: the four results of the products at the points.
METAFAST_INLINE void from_points(const V (&m)[kAxis], V (&y)[4]) {
  const V even_a = m[2] + m[3], odd_a = constant(kA) * (m[2] - m[3]);
  const V even_b = m[4] + m[5], odd_b = constant(kB) * (m[4] - m[5]);
  y[0] = m[1] + (even_a + even_b);
  y[1] = odd_a + odd_b;
  y[2] = fma<float>(constant(kAA), even_a, constant(kBB) * even_b);
  y[3] = fma<float>(constant(kAA), odd_a, fma<float>(constant(kBB), odd_b, m[0]));
}

// A y: the adjoint of from_points.
METAFAST_INLINE void from_points_adjoint(const V (&y)[4], V (&m)[kAxis]) {
  const V even_a = fma<float>(constant(kAA), y[2], y[0]), odd_a = fma<float>(constant(kAA), y[3], y[1]);
  const V even_b = fma<float>(constant(kBB), y[2], y[0]), odd_b = fma<float>(constant(kBB), y[3], y[1]);
  m[0] = y[3], m[1] = y[0];
  m[2] = fma<float>(constant(kA), odd_a, even_a), m[3] = fma<float>(constant(kA), -odd_a, even_a);
  m[4] = fma<float>(constant(kB), odd_b, even_b), m[5] = fma<float>(constant(kB), -odd_b, even_b);
}

// What the values at 0, ±a, ±b are divided by: products of differences of the points.
inline constexpr double kScale0 = 1 / (kAA * kBB), kScaleA = 1 / (2 * kAA * (kAA - kBB)),
                        kScaleB = 1 / (2 * kBB * (kBB - kAA));

// G g: the filter's values at the points.
METAFAST_INLINE void filter_to_points(const V (&g)[3], V (&t)[kAxis]) {
  const V even_a = constant(kScaleA) * fma<float>(constant(kAA), g[2], g[0]);
  const V even_b = constant(kScaleB) * fma<float>(constant(kBB), g[2], g[0]);
  t[0] = g[2], t[1] = constant(kScale0) * g[0];
  t[2] = fma<float>(constant(kScaleA * kA), g[1], even_a),
  t[3] = fma<float>(constant(-kScaleA * kA), g[1], even_a);
  t[4] = fma<float>(constant(kScaleB * kB), g[1], even_b),
  t[5] = fma<float>(constant(-kScaleB * kB), g[1], even_b);
}

// Gᵀ t: the adjoint of filter_to_points.
METAFAST_INLINE void filter_to_points_adjoint(const V (&t)[kAxis], V (&g)[3]) {
  const V even_a = constant(kScaleA) * (t[2] + t[3]), odd_a = constant(kScaleA * kA) * (t[2] - t[3]);
  const V even_b = constant(kScaleB) * (t[4] + t[5]), odd_b = constant(kScaleB * kB) * (t[4] - t[5]);
  g[0] = fma<float>(constant(kScale0), t[1], even_a + even_b);
  g[1] = odd_a + odd_b;
  g[2] = fma<float>(constant(kAA), even_a, fma<float>(constant(kBB), even_b, t[0]));
}

}  // namespace metafast::kernels::METAFAST_ISA
