// Sums of many terms with a small error: rows of a chunk go to four accumulators in turn, chunks are added
// pairwise. Error of a sum of n terms: at most (kChunk / 4 + log2(n) + 4) u sum |term|, u the unit roundoff.
// The order depends on n alone.
#pragma once
#include "pack.hpp"
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

inline constexpr int64_t kChunk = 128;

// v with the lanes outside the mask zero.
template <class T>
METAFAST_INLINE Vec<T> keep(Vec<T> v, const Mask<T>& m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(m.bits), v);
  else
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(m.bits), v);
#elif defined(__AVX2__)
  return from_bits<T>(bits_of<T>(v) & m.lanes);
#else
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i < m.n ? v[i] : T(0);
  return v;
#endif
}

// A binary counter of partial results: result k waits for its neighbour of the same size.
template <class T, int Q, class Join>
struct Pairwise {
  Vec<T> waiting[40][Q];
  uint64_t count = 0;

  // `used` of the Q quantities take part.
  METAFAST_INLINE void push(Vec<T>* v, int used = Q) {
    uint64_t n = count++;
    int level = 0;
    for (; n & 1; n >>= 1, ++level)
      for (int q = 0; q < used; ++q) v[q] = Join::of(waiting[level][q], v[q]);
    for (int q = 0; q < used; ++q) waiting[level][q] = v[q];
  }

  METAFAST_INLINE void finish(Vec<T>* out, T empty, int used = Q) {
    bool any = false;
    for (int q = 0; q < used; ++q) out[q] = splat(empty);
    for (int level = 0; count >> level; ++level) {
      if (!(count >> level & 1)) continue;
      for (int q = 0; q < used; ++q) out[q] = any ? Join::of(waiting[level][q], out[q]) : waiting[level][q];
      any = true;
    }
  }
};

template <class T>
struct Add {
  static METAFAST_INLINE Vec<T> of(Vec<T> a, Vec<T> b) { return a + b; }
  static constexpr T empty = 0;
};
template <class T>
struct Max {
  static METAFAST_INLINE Vec<T> of(Vec<T> a, Vec<T> b) { return max_nan<T>(a, b); }
  static constexpr T empty = -__builtin_inf();
};

// The lanes of each of v[0..kLanes) joined, those of v[n] in lane n: at every level the halves of two vectors.
template <class T, class Join>
METAFAST_INLINE Vec<T> join_lanes(Vec<T>* v) {
  METAFAST_UNROLL for (int half = kLanes<T> / 2; half > 0; half /= 2)
      METAFAST_UNROLL for (int i = 0; i < half; ++i) v[i] =
          Join::of(interleave_low(v[i], v[i + half]), interleave_high(v[i], v[i + half]));
  return v[0];
}

// Joins Q quantities over rows [0, n): term(row, q) writes the quantities of one row to q[0..Q).
template <class T, int Q, class Join, class Term>
METAFAST_INLINE void join_chunk(Vec<T>* out, int64_t n, Term term) {
  Vec<T> acc[4][Q];  // every loop over it is unrolled: an index that varies would keep it in memory
  METAFAST_UNROLL for (int u = 0; u < 4; ++u) METAFAST_UNROLL for (int q = 0; q < Q; ++q) acc[u][q] =
      splat(Join::empty);
  int64_t r = 0;
  for (; r + 4 <= n; r += 4) METAFAST_UNROLL for (int u = 0; u < 4; ++u) {
      Vec<T> t[Q];
      term(r + u, t);
      METAFAST_UNROLL for (int q = 0; q < Q; ++q) acc[u][q] = Join::of(acc[u][q], t[q]);
    }
  for (; r < n; ++r) {
    Vec<T> t[Q];
    term(r, t);
    METAFAST_UNROLL for (int q = 0; q < Q; ++q) acc[0][q] = Join::of(acc[0][q], t[q]);
  }
  METAFAST_UNROLL for (int q = 0; q < Q; ++q) out[q] =
      Join::of(Join::of(acc[0][q], acc[1][q]), Join::of(acc[2][q], acc[3][q]));
}

// The same over any number of rows.
template <class T, int Q, class Join = Add<T>, class Term>
METAFAST_INLINE void join_rows(Vec<T>* out, int64_t n, Term term) {
  if (n <= kChunk) return join_chunk<T, Q, Join>(out, n, term);
  Pairwise<T, Q, Join> pairwise;
  for (int64_t r = 0; r < n; r += kChunk) {
    Vec<T> part[Q];
    join_chunk<T, Q, Join>(part, min64(kChunk, n - r), [&](int64_t k, Vec<T>* q) { term(r + k, q); });
    pairwise.push(part);
  }
  pairwise.finish(out, Join::empty);
}

// Sums of Q quantities over the n elements of a run: term(get, q), where get(p) loads the vector of p[0..n)
// at hand.
template <class T, int Q, class Term>
METAFAST_INLINE void sum_run(T* out, int64_t n, Term term) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[Q];
  join_rows<T, Q>(sum, n / L,
                  [&](int64_t k, Vec<T>* q) { term([&](const T* p) { return load(p + k * L); }, q); });
  if (n % L) {
    const Mask<T> m(n % L);
    Vec<T> t[Q];
    term([&](const T* p) { return load(p + n / L * L, m); }, t);
    for (int q = 0; q < Q; ++q) sum[q] += keep<T>(t[q], m);
  }
  for (int q = 0; q < Q; ++q) out[q] = sum_lanes<T>(sum[q]);
}

// Calls f(get, put) for every vector of a run: get(p) loads, put(p, v) stores.
template <class T, class F>
METAFAST_INLINE void for_run(int64_t n, F f) {
  constexpr int L = kLanes<T>;
  int64_t k = 0;
  for (; k + L <= n; k += L)
    f([&](const T* p) { return load(p + k); }, [&](T* p, Vec<T> v) { store(p + k, v); });
  if (k < n) {
    const Mask<T> m(n - k);
    f([&](const T* p) { return load(p + k, m); }, [&](T* p, Vec<T> v) { store(p + k, v, m); });
  }
}

}  // namespace metafast::kernels::METAFAST_ISA
