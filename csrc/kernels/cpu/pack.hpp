// Moves a strided matrix into the order the register tile reads: rows k, columns n together.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

// Lower and upper halves of the lanes of a and b, taken in turn.
template <class V>
METAFAST_INLINE V interleave_low(V a, V b) {
  constexpr int L = sizeof(V) / sizeof(a[0]);
  if constexpr (L == 16)
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  else if constexpr (L == 8)
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  else if constexpr (L == 4)
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  else
    return __builtin_shufflevector(a, b, 0, 2);
}
template <class V>
METAFAST_INLINE V interleave_high(V a, V b) {
  constexpr int L = sizeof(V) / sizeof(a[0]);
  if constexpr (L == 16)
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  else if constexpr (L == 8)
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  else if constexpr (L == 4)
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  else
    return __builtin_shufflevector(a, b, 1, 3);
}

// Transposes the square of kLanes vectors in place: log2(kLanes) perfect shuffles.
template <class T>
METAFAST_INLINE void transpose_square(Vec<T>* v) {
  constexpr int L = kLanes<T>;
  METAFAST_UNROLL for (int width = 1; width < L; width *= 2) {
    Vec<T> w[L];
    METAFAST_UNROLL for (int i = 0; i < L / 2; ++i) {
      w[2 * i] = interleave_low(v[i], v[i + L / 2]);
      w[2 * i + 1] = interleave_high(v[i], v[i + L / 2]);
    }
    METAFAST_UNROLL for (int i = 0; i < L; ++i) v[i] = w[i];
  }
}

#if defined(__AVX2__)
// Transposes the 4 x 4 square within each 128-bit lane of v[0..4).
METAFAST_INLINE void transpose_lanes(Vec<float>* v) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]),
               c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
  v[0] = _mm512_shuffle_ps(a, c, 0x44), v[1] = _mm512_shuffle_ps(a, c, 0xee);
  v[2] = _mm512_shuffle_ps(b, d, 0x44), v[3] = _mm512_shuffle_ps(b, d, 0xee);
#else
  const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]),
               c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
  v[0] = _mm256_shuffle_ps(a, c, 0x44), v[1] = _mm256_shuffle_ps(a, c, 0xee);
  v[2] = _mm256_shuffle_ps(b, d, 0x44), v[3] = _mm256_shuffle_ps(b, d, 0xee);
#endif
}

// row(k)[0..L) = src[k + n * cs] for n < 4 lanes, else 0; K >= 4. Lanes are filled by loads, which leaves
// shuffles within lanes alone.
template <int lanes, class Row>
METAFAST_INLINE void pack_lanes(const float* src, int64_t cs, int64_t K, Row row) {
  const int64_t cs3 = 3 * cs;
  const auto four = [&](int64_t k) {
    const float* p[4];
    METAFAST_UNROLL for (int g = 0; g < lanes; ++g) {
      p[g] = src + 4 * g * cs + k;
      asm("" : "+r"(p[g]));  // else the compiler keeps 16 pointers, on the stack
    }
    Vec<float> v[4];
    METAFAST_UNROLL for (int i = 0; i < 4; ++i) {
      auto at = [&](int g) { return _mm_loadu_ps(p[g] + (i == 3 ? cs3 : i * cs)); };
      v[i] = Vec<float>{};
#if defined(__AVX512F__)
      if constexpr (lanes > 0) v[i] = _mm512_zextps128_ps512(at(0));
      if constexpr (lanes > 1) v[i] = _mm512_insertf32x4(v[i], at(1), 1);
      if constexpr (lanes > 2) v[i] = _mm512_insertf32x4(v[i], at(2), 2);
      if constexpr (lanes > 3) v[i] = _mm512_insertf32x4(v[i], at(3), 3);
#else
      if constexpr (lanes > 0) v[i] = _mm256_zextps128_ps256(at(0));
      if constexpr (lanes > 1) v[i] = _mm256_insertf128_ps(v[i], at(1), 1);
#endif
    }
    transpose_lanes(v);
    METAFAST_UNROLL for (int i = 0; i < 4; ++i) store(row(k + i), v[i]);
  };
  for (int64_t k = 0; k + 4 <= K; k += 4) four(k);
  if (K & 3) four(K - 4);  // the last four again rather than a rest
}

// pack_rows of floats whose k lie together, K >= 4.
template <class Row>
METAFAST_INLINE void pack_transposed(const float* src, int64_t cs, int64_t K, int64_t N, int64_t width,
                                     Row row) {
  constexpr int L = kLanes<float>;
  for (int64_t n = 0; n < width; n += L, src += L * cs) {
    const int64_t columns = min64(L, max64(0, N - n)), lanes = columns / 4;
    auto place = [&](int64_t k) { return row(k) + n; };
    if (lanes == 0) pack_lanes<0>(src, cs, K, place);
    if (lanes == 1) pack_lanes<1>(src, cs, K, place);
    if constexpr (L > 8) {
      if (lanes == 2) pack_lanes<2>(src, cs, K, place);
      if (lanes == 3) pack_lanes<3>(src, cs, K, place);
    }
    if (lanes == L / 4) pack_lanes<L / 4>(src, cs, K, place);
    for (int64_t j = 4 * lanes; j < columns; ++j)
      for (int64_t k = 0; k < K; ++k) place(k)[j] = src[j * cs + k];
  }
}
#endif

// row(k)[n] = src[k * rs + n * cs] for k < K, n < N, and 0 for N <= n < width, where N <= width and width is
// whole vectors. `row` gives the place of a row of `width` elements.
template <class T, class Row>
METAFAST_INLINE void pack_rows(const T* src, int64_t rs, int64_t cs, int64_t K, int64_t N, int64_t width,
                               Row row) {
  constexpr int L = kLanes<T>;
  if (cs == 1) {
    const int64_t whole = N / L * L;
    const Mask<T> rest(N - whole);
    for (int64_t k = 0; k < K; ++k, src += rs) {
      T* dst = row(k);
      int64_t n = 0;
      for (; n < whole; n += L) store(dst + n, load(src + n));
      if (n < N) store(dst + n, load(src + n, rest)), n += L;
      for (; n < width; n += L) store(dst + n, Vec<T>{});
    }
    return;
  }
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    if (rs == 1 && K >= 4) return pack_transposed(src, cs, K, N, width, row);
  }
#endif
  if (rs == 1) {
    for (int64_t n = 0; n < width; n += L)
      for (int64_t k = 0; k < K; k += L) {
        Vec<T> v[L];
        const Mask<T> depth(min64(L, K - k));
        METAFAST_UNROLL for (int j = 0; j < L; ++j) v[j] =
            n + j < N ? load(src + k + (n + j) * cs, depth) : Vec<T>{};
        transpose_square<T>(v);
        if (k + L <= K) {
          METAFAST_UNROLL for (int j = 0; j < L; ++j) store(row(k + j) + n, v[j]);
        } else {
          METAFAST_UNROLL for (int j = 0; j < L; ++j) if (k + j < K) store(row(k + j) + n, v[j]);
        }
      }
    return;
  }
  for (int64_t k = 0; k < K; ++k) {
    T* dst = row(k);
    int64_t n = 0;
    for (; n < N; ++n) dst[n] = src[k * rs + n * cs];
    for (; n < width; ++n) dst[n] = 0;
  }
}

}  // namespace metafast::kernels::METAFAST_ISA
