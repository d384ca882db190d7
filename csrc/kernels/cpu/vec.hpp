// Vectors of the instruction set a file is compiled for, on the GCC/Clang vector extension.
//
// The kernel sources are compiled once per instruction set, with METAFAST_ISA naming the namespace. All they
// share lies in that namespace, so that the linker never keeps one set's copy of an inline function for
// another set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/kernel.hpp"

#ifndef METAFAST_ISA
#define METAFAST_ISA baseline
#endif

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define METAFAST_INLINE inline __attribute__((always_inline))
#define METAFAST_UNROLL _Pragma("GCC unroll 32")

namespace metafast::kernels::METAFAST_ISA {

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
inline constexpr int kVecRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
inline constexpr int kVecRegisters = 16;
#else
inline constexpr int kVecBytes = 16;
#if defined(__aarch64__)
inline constexpr int kVecRegisters = 32;
#else
inline constexpr int kVecRegisters = 16;
#endif
#endif

template <class T>
inline constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float type __attribute__((vector_size(kVecBytes)));
  typedef int32_t bits __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecTypes<double> {
  typedef double type __attribute__((vector_size(kVecBytes)));
  typedef int64_t bits __attribute__((vector_size(kVecBytes)));
};

template <class T>
using Vec = typename VecTypes<T>::type;
template <class T>
using Bits = typename VecTypes<T>::bits;  // what a comparison of two Vec gives: -1 true, 0 false

template <class T>
METAFAST_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class T>
METAFAST_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
METAFAST_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// a * b + c in one rounding, where the instruction set has it. Spelled out: whether the compiler contracts the
// expression depends on the code around it, and the same element must get the same bits from every tile and part.
template <class T>
METAFAST_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_fmadd_ps(a, b, c);
  else
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  if constexpr (sizeof(T) == 4)
    return _mm256_fmadd_ps(a, b, c);
  else
    return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 4)
    return vfmaq_f32(c, a, b);
  else
    return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// The same of one number.
template <class T>
METAFAST_INLINE T fma_one(T a, T b, T c) {
#if defined(__FMA__) || defined(__aarch64__)
  return sizeof(T) == 4 ? static_cast<T>(__builtin_fmaf(a, b, c)) : static_cast<T>(__builtin_fma(a, b, c));
#else
  return a * b + c;
#endif
}

template <class T>
METAFAST_INLINE Vec<T> select(Bits<T> m, Vec<T> a, Vec<T> b) {
  return m ? a : b;
}

template <class T>
METAFAST_INLINE Bits<T> bits_of(Vec<T> v) {
  return reinterpret_cast<Bits<T>>(v);
}
template <class T>
METAFAST_INLINE Vec<T> from_bits(Bits<T> v) {
  return reinterpret_cast<Vec<T>>(v);
}

// The first n lanes, 0 <= n <= kLanes<T>. Masked loads give zero and masked stores touch no memory elsewhere.
template <class T>
struct Mask {
#if defined(__AVX512F__)
  uint32_t bits;
  METAFAST_INLINE explicit Mask(int64_t n) : bits((1u << n) - 1u) {}
#elif defined(__AVX2__)
  Bits<T> lanes;
  int64_t n;
  METAFAST_INLINE explicit Mask(int64_t count) : n(count) {
    Bits<T> iota;
    for (int i = 0; i < kLanes<T>; ++i) iota[i] = i;
    lanes = iota < (static_cast<decltype(lanes[0] + 0)>(n) - Bits<T>{});
  }
#else
  int n;
  METAFAST_INLINE explicit Mask(int64_t count) : n(static_cast<int>(count)) {}
#endif
};

template <class T>
METAFAST_INLINE Vec<T> load(const T* p, const Mask<T>& m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(m.bits), p);
  else
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(m.bits), p);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(m.lanes));
  else
    return _mm256_maskload_pd(p, reinterpret_cast<__m256i>(m.lanes));
#else
  Vec<T> v{};
  for (int i = 0; i < kLanes<T>; ++i)
    if (i < m.n) v[i] = p[i];
  return v;
#endif
}

template <class T>
METAFAST_INLINE void store(T* p, Vec<T> v, const Mask<T>& m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(m.bits), v);
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(m.bits), v);
#elif defined(__AVX2__)
  // By halves, of which one is stored if any: a masked store takes as long as a dozen others (Zen 3).
  if (m.n >= kLanes<T>) return store(p, v);
  if constexpr (sizeof(T) == 4) {
    __m128 rest = _mm256_castps256_ps128(v);
    if (m.n & 4) _mm_storeu_ps(p, rest), p += 4, rest = _mm256_extractf128_ps(v, 1);
    if (m.n & 2) _mm_storel_pi(reinterpret_cast<__m64*>(p), rest), p += 2, rest = _mm_movehl_ps(rest, rest);
    if (m.n & 1) _mm_store_ss(p, rest);
  } else {
    __m128d rest = _mm256_castpd256_pd128(v);
    if (m.n & 2) _mm_storeu_pd(p, rest), p += 2, rest = _mm256_extractf128_pd(v, 1);
    if (m.n & 1) _mm_store_sd(p, rest);
  }
#else
  for (int i = 0; i < kLanes<T>; ++i)
    if (i < m.n) p[i] = v[i];
#endif
}

// All lanes: what a loop over vectors passes where Mask is for the last of them. (On AVX2 a masked store takes
// as long as a dozen whole ones.)
struct Whole {};
template <class T>
METAFAST_INLINE Vec<T> load(const T* p, Whole) {
  return load(p);
}
template <class T>
METAFAST_INLINE void store(T* p, Vec<T> v, Whole) {
  store(p, v);
}

// Sum of the lanes, halving: the order is that of the instruction set, never of the caller.
template <class T>
METAFAST_INLINE T sum_lanes(Vec<T> v) {
  T x[kLanes<T>];
  __builtin_memcpy(x, &v, sizeof v);
  METAFAST_UNROLL for (int w = kLanes<T> / 2; w > 0; w /= 2) METAFAST_UNROLL for (int i = 0; i < w; ++i)
      x[i] += x[i + w];
  return x[0];
}

// max(a, b), NaN where either is NaN.
template <class T>
METAFAST_INLINE Vec<T> max_nan(Vec<T> a, Vec<T> b) {
  return ((a > b) | (a != a)) ? a : b;
}
template <class T>
METAFAST_INLINE Vec<T> min_nan(Vec<T> a, Vec<T> b) {
  return ((a < b) | (a != a)) ? a : b;
}
template <class T>
METAFAST_INLINE T max_lanes(Vec<T> v) {
  T m = v[0];
  for (int i = 1; i < kLanes<T>; ++i) m = (m > v[i] || m != m) ? m : v[i];
  return m;
}

struct Range {
  int64_t begin, end;
};

// Share `part` of 0..n, cut at multiples of `unit`.
METAFAST_INLINE Range share(int64_t n, int part, int parts, int64_t unit = 1) {
  if (parts <= 1) return {0, n};
  const int64_t units = (n + unit - 1) / unit;
  const int64_t begin = units * part / parts * unit, end = units * (part + 1) / parts * unit;
  return {begin < n ? begin : n, end < n ? end : n};
}

// Calls visit(k, lanes) for the vectors that make up the range: lanes is Whole, or the Mask of the last.
template <class T, class Visit>
METAFAST_INLINE void each_vector(Range range, Visit visit) {
  int64_t k = range.begin;
  for (; k + kLanes<T> <= range.end; k += kLanes<T>) visit(k, Whole{});
  if (k < range.end) visit(k, Mask<T>(range.end - k));
}

METAFAST_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
METAFAST_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
METAFAST_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

METAFAST_INLINE int64_t no_scratch(const int64_t*) noexcept { return 0; }

}  // namespace metafast::kernels::METAFAST_ISA
