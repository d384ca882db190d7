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
