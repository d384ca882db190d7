#include "normalise.hpp"

#include "math.hpp"
#include "sums.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

// The same formulas serve two layouts. Columns: a vector holds neighbouring `inner` positions of one row,
// statistics are vectors. Runs (inner = 1): a vector holds neighbouring `reduce` positions, statistics are
// equal in all lanes.
//
// Columns are taken a band at a time, the rows of a band a chunk at a time: a row's part of the band is read
// as one piece, and a chunk still lies in cache when it is read for the second time.
constexpr int kBand = 8;            // vectors
constexpr int64_t kWriteRows = 64;  // rows written at a time

// Neighbouring vectors of columns over all rows, the last of them perhaps not whole.
template <class T>
struct Columns {
  static constexpr int L = kLanes<T>;
  int64_t at, reduce, inner;
  int vectors;
  int64_t last;  // columns of the last vector

  // Calls f(first vector, count, get) for groups of neighbouring vectors of the band: get(p, v) loads vector
  // v of the group, put(p, v, x) stores it, both from the first row of `rows`.
  template <int wide, class F>
  METAFAST_INLINE void groups(F f) const {
    int v = 0;
    const int whole = last == L ? vectors : vectors - 1;
    for (; v + wide <= whole; v += wide) f(v, Constant<wide>{}, Constant<1>{});
    if constexpr (wide > 2)
      for (; v + 2 <= whole; v += 2) f(v, Constant<2>{}, Constant<1>{});
    for (; v < whole; ++v) f(v, Constant<1>{}, Constant<1>{});
    if (v < vectors) f(v, Constant<1>{}, Constant<0>{});
  }

  template <int n>
  struct Constant {
    static constexpr int value = n;
  };

  // Means of Q quantities of every vector: out[v * Q + q].
  template <int Q, class Term>
  METAFAST_INLINE void means(Vec<T>* out, Term term) const {
    constexpr int wide = kVecRegisters == 32 ? (Q == 1 ? 4 : 2) : 1;  // four accumulators a quantity
    Pairwise<T, Q * kBand, Add<T>> pairwise;
    for (int64_t r = 0; r < reduce; r += kChunk) {
      const int64_t rows = min64(kChunk, reduce - r);
      Vec<T> part[Q * kBand];
      groups<wide>([&](int v, auto count, auto whole) {
        constexpr int V = decltype(count)::value;
        const int64_t base = at + r * inner + v * L;
        const Mask<T> mask(last);
        join_chunk<T, Q * V, Add<T>>(part + v * Q, rows, [&](int64_t row, Vec<T>* q) {
          METAFAST_UNROLL for (int u = 0; u < V; ++u) {
            const int64_t offset = base + row * inner + u * L;
            term(
                [&](const T* p) {
                  if constexpr (decltype(whole)::value)
                    return load(p + offset);
                  else
                    return load(p + offset, mask);
                },
                q + u * Q);
          }
        });
      });
      pairwise.push(part, vectors * Q);
    }
    pairwise.finish(out, T(0), vectors * Q);
    for (int k = 0; k < vectors * Q; ++k) out[k] /= splat(static_cast<T>(reduce));
  }

  // Mean and biased variance of every vector of x, in one pass over memory: each chunk's squares are taken
  // about its own mean, and two sets of rows are put together by
  //   M2 = M2a + M2b + (Sa / a - Sb / b)^2 a b / (a + b)     (Chan, Golub, LeVeque 1979)
  // All of x is read less the first chunk's mean (0 where that is not finite), so that a mean far from 0
  // costs the variance no digits.
  METAFAST_INLINE void moments(Vec<T>* mean, Vec<T>* var, const T* x) const {
    struct Part {
      int64_t rows;
      Vec<T> sum[kBand], squares[kBand];
    };
    Part waiting[40];
    int64_t count = 0;
    Vec<T> shift[kBand];
    auto merge = [&](const Part& a, Part& b) {
      const Vec<T> a_rows = splat(static_cast<T>(a.rows)), b_rows = splat(static_cast<T>(b.rows));
      const Vec<T> weight = splat(static_cast<T>(static_cast<double>(a.rows) * static_cast<double>(b.rows) /
                                                 static_cast<double>(a.rows + b.rows)));
      for (int v = 0; v < vectors; ++v) {
        const Vec<T> d = a.sum[v] / a_rows - b.sum[v] / b_rows;
        b.squares[v] = a.squares[v] + b.squares[v] + d * d * weight;
        b.sum[v] = a.sum[v] + b.sum[v];
      }
      b.rows += a.rows;
    };
    for (int64_t r = 0; r < reduce; r += kChunk) {
      Part part;
      part.rows = min64(kChunk, reduce - r);
      groups<4>([&](int v, auto group, auto whole) {
        constexpr int V = decltype(group)::value;
        const T* base = x + at + r * inner + v * L;
        const Mask<T> mask(last);
        auto raw = [&](int64_t row, int u) {
          if constexpr (decltype(whole)::value)
            return load(base + row * inner + u * L);
          else
            return load(base + row * inner + u * L, mask);
        };
        if (r == 0) {
          join_chunk<T, V, Add<T>>(shift + v, part.rows, [&](int64_t row, Vec<T>* q) {
            METAFAST_UNROLL for (int u = 0; u < V; ++u) q[u] = raw(row, u);
          });
          for (int u = v; u < v + V; ++u) {
            shift[u] /= splat(static_cast<T>(part.rows));
            shift[u] = shift[u] - shift[u] == Vec<T>{} ? shift[u] : Vec<T>{};
          }
        }
        Vec<T> less[V];
        METAFAST_UNROLL for (int u = 0; u < V; ++u) less[u] = shift[v + u];
        auto get = [&](int64_t row, int u) { return raw(row, u) - less[u]; };
        join_chunk<T, V, Add<T>>(part.sum + v, part.rows, [&](int64_t row, Vec<T>* q) {
          METAFAST_UNROLL for (int u = 0; u < V; ++u) q[u] = get(row, u);
        });
        Vec<T> m[V];
        METAFAST_UNROLL for (int u = 0; u < V; ++u) m[u] = part.sum[v + u] / splat(static_cast<T>(part.rows));
        join_chunk<T, V, Add<T>>(part.squares + v, part.rows, [&](int64_t row, Vec<T>* q) {
          METAFAST_UNROLL for (int u = 0; u < V; ++u) {
            const Vec<T> d = get(row, u) - m[u];
            q[u] = d * d;
          }
        });
      });
      int level = 0;
      for (int64_t n = count++; n & 1; n >>= 1, ++level) merge(waiting[level], part);
      waiting[level] = part;
    }
    int low = 0;
    while (!(count >> low & 1)) ++low;
    Part total = waiting[low];
    for (int level = low + 1; count >> level; ++level)
      if (count >> level & 1) merge(waiting[level], total);
    const Vec<T> rows = splat(static_cast<T>(reduce));
    for (int v = 0; v < vectors; ++v)
      mean[v] = shift[v] + total.sum[v] / rows, var[v] = total.squares[v] / rows;
  }

  // Calls f(get, put, v) for every vector of every row, the last rows first: these still lie in cache.
  template <int wide, class F>
  METAFAST_INLINE void each(F f) const {
    for (int64_t r = (reduce - 1) / kWriteRows * kWriteRows; r >= 0; r -= kWriteRows) {
      const int64_t rows = min64(kWriteRows, reduce - r);
      groups<wide>([&](int v, auto count, auto whole) {
        constexpr int V = decltype(count)::value;
        const Mask<T> mask(last);
        f(v, count, [&](auto body) {
          int64_t offset = at + r * inner + v * L;
          for (int64_t row = 0; row < rows; ++row, offset += inner)
            METAFAST_UNROLL for (int u = 0; u < V; ++u) {
              const int64_t here = offset + u * L;
              body(
                  u,
                  [&](const T* p) {
                    if constexpr (decltype(whole)::value)
                      return load(p + here);
                    else
                      return load(p + here, mask);
                  },
                  [&](T* p, Vec<T> y) {
                    if constexpr (decltype(whole)::value)
                      store(p + here, y);
                    else
                      store(p + here, y, mask);
                  });
            }
        });
      });
    }
  }
  METAFAST_INLINE Vec<T> statistic(const T* p, int v) const { return load(p + v * L, mask_of(v)); }
  METAFAST_INLINE void set_statistic(T* p, int v, Vec<T> x) const { store(p + v * L, x, mask_of(v)); }

 private:
  METAFAST_INLINE Mask<T> mask_of(int v) const { return Mask<T>(v == vectors - 1 ? last : L); }
};

// One run: a band of one vector.
template <class T>
struct Run {
  int64_t at, reduce;
  static constexpr int vectors = 1;
  struct One {
    static constexpr int value = 1;
  };

  template <int Q, class Term>
  METAFAST_INLINE void means(Vec<T>* out, Term term) const {
    T sum[Q];
    sum_run<T, Q>(sum, reduce,
                  [&](auto get, Vec<T>* q) { term([&](const T* p) { return get(p + at); }, q); });
    for (int q = 0; q < Q; ++q) out[q] = splat(sum[q] / static_cast<T>(reduce));
  }
  METAFAST_INLINE void moments(Vec<T>* mean, Vec<T>* var, const T* x) const {
    means<1>(mean, [&](auto get, Vec<T>* q) { q[0] = get(x); });
    const Vec<T> m = mean[0];
    means<1>(var, [&](auto get, Vec<T>* q) {
      const Vec<T> d = get(x) - m;
      q[0] = d * d;
    });
  }
  template <int wide, class F>
  METAFAST_INLINE void each(F f) const {
    f(0, One{}, [&](auto body) {
      for_run<T>(reduce, [&](auto get, auto put) {
        body(0, [&](const T* p) { return get(p + at); }, [&](T* p, Vec<T> v) { put(p + at, v); });
      });
    });
  }
  METAFAST_INLINE Vec<T> statistic(const T* p, int) const { return splat(*p); }
  METAFAST_INLINE void set_statistic(T* p, int, Vec<T> v) const { *p = v[0]; }
};

// Calls f(band, position of its statistics) for all bands of this part. An element's arithmetic does not
// depend on the band it falls into.
template <class T, class F>
METAFAST_INLINE void for_bands(const Args& a, F f) {
  constexpr int L = kLanes<T>;
  const int64_t outer = a.i[0], reduce = a.i[1], inner = a.i[2];
  if (reduce == 0) return;
  if (inner == 1) {
    const Range mine = share(outer, a.part, a.parts);
    for (int64_t o = mine.begin; o < mine.end; ++o) f(Run<T>{o * reduce, reduce}, o);
    return;
  }
  const int64_t vectors = (inner + L - 1) / L;
  const Range mine = share(outer * vectors, a.part, a.parts);
  for (int64_t k = mine.begin; k < mine.end;) {
    const int64_t o = k / vectors, first = k % vectors, column = first * L;
    const int64_t count = min64(min64(kBand, vectors - first), mine.end - k);
    f(Columns<T>{o * reduce * inner + column, reduce, inner, static_cast<int>(count),
                 min64(L, inner - column - (count - 1) * L)},
      o * inner + column);
    k += count;
  }
}

template <class T>
const T* input(const Args& a, int k) {
  return static_cast<const T*>(a.ptr[k]);
}
template <class T>
T* output(const Args& a, int k) {
  return static_cast<T*>(a.ptr[k]);
}

}  // namespace

template <class T>
int standardize(const Args& a) noexcept {
  const T* x = input<T>(a, 0);
  T *xhat = output<T>(a, 1), *rstd = output<T>(a, 2), *mean = output<T>(a, 3), *var = output<T>(a, 4);
  const Vec<T> eps = splat(static_cast<T>(a.f[0]));
  for_bands<T>(a, [&](const auto& band, int64_t s) {
    Vec<T> m[kBand], v[kBand], r[kBand];
    band.moments(m, v, x);
    for (int k = 0; k < band.vectors; ++k) {
      r[k] = splat(T(1)) / sqrt_v<T>(v[k] + eps);
      band.set_statistic(rstd + s, k, r[k]);
      band.set_statistic(mean + s, k, m[k]), band.set_statistic(var + s, k, v[k]);
    }
    band.template each<4>([&](int first, auto count, auto rows) {
      constexpr int V = decltype(count)::value;
      Vec<T> mu[V], scale[V];
      METAFAST_UNROLL for (int u = 0; u < V; ++u) mu[u] = m[first + u], scale[u] = r[first + u];
      rows([&](int u, auto get, auto put) { put(xhat, (get(x) - mu[u]) * scale[u]); });
    });
  });
  return kOk;
}

template <class T>
int moments(const Args& a) noexcept {
  const T* x = input<T>(a, 0);
  T *mean = output<T>(a, 1), *var = output<T>(a, 2);
  for_bands<T>(a, [&](const auto& band, int64_t s) {
    Vec<T> m[kBand], v[kBand];
    band.moments(m, v, x);
    for (int k = 0; k < band.vectors; ++k)
      band.set_statistic(mean + s, k, m[k]), band.set_statistic(var + s, k, v[k]);
  });
  return kOk;
}

template <class T>
int join_moments(const Args& a) noexcept {
  const T *means = input<T>(a, 0), *vars = input<T>(a, 1);
  T *rstd = output<T>(a, 2), *mean = output<T>(a, 3), *var = output<T>(a, 4);
  const Vec<T> eps = splat(static_cast<T>(a.f[0]));
  for_bands<T>(a, [&](const auto& band, int64_t s) {
    Vec<T> m[kBand], between[kBand], within[kBand];
    band.moments(m, between, means);
    band.template means<1>(within, [&](auto get, Vec<T>* q) { q[0] = get(vars); });
    for (int k = 0; k < band.vectors; ++k) {
      const Vec<T> v = within[k] + between[k];
      band.set_statistic(rstd + s, k, splat(T(1)) / sqrt_v<T>(v + eps));
      band.set_statistic(mean + s, k, m[k]), band.set_statistic(var + s, k, v);
    }
  });
  return kOk;
}

template <class T>
int project(const Args& a) noexcept {
  const T *v = input<T>(a, 0), *xhat = input<T>(a, 1), *rstd = input<T>(a, 2);
  T *out = output<T>(a, 3), *corr = output<T>(a, 4);
  const bool add = a.i[3] != 0;
  for_bands<T>(a, [&](const auto& band, int64_t s) {
    Vec<T> m[2 * kBand], r[kBand];
    band.template means<2>(m, [&](auto get, Vec<T>* q) { q[0] = get(v), q[1] = q[0] * get(xhat); });
    for (int k = 0; k < band.vectors; ++k) {
      r[k] = band.statistic(rstd + s, k);
      band.set_statistic(corr + s, k, m[2 * k + 1]);
    }
    band.template each<4>([&](int first, auto count, auto rows) {
      constexpr int V = decltype(count)::value;
      Vec<T> mean[V], c[V], scale[V];
      METAFAST_UNROLL for (int u = 0; u < V; ++u) mean[u] = m[2 * (first + u)], c[u] = m[2 * (first + u) + 1],
                                                  scale[u] = r[first + u];
      rows([&](int u, auto get, auto put) {
        const Vec<T> p = scale[u] * (get(v) - mean[u] - get(xhat) * c[u]);
        put(out, add ? get(out) + p : p);
      });
    });
  });
  return kOk;
}

template <class T>
int project_tangent(const Args& a) noexcept {
  const T *v = input<T>(a, 0), *xhat = input<T>(a, 1), *xhat_dot = input<T>(a, 2), *rstd = input<T>(a, 3),
          *corr_dot = input<T>(a, 4);
  T* out = output<T>(a, 5);
  const bool add = a.i[3] != 0;
  for_bands<T>(a, [&](const auto& band, int64_t s) {
    Vec<T> m[3 * kBand];
    band.template means<3>(
        m, [&](auto get, Vec<T>* q) { q[0] = get(v), q[1] = q[0] * get(xhat), q[2] = q[0] * get(xhat_dot); });
    band.template each<4>([&](int first, auto count, auto rows) {
      constexpr int V = decltype(count)::value;
      Vec<T> mean[V], c[V], d[V], r[V], rc[V];
      METAFAST_UNROLL for (int u = 0; u < V; ++u) {
        const Vec<T>* of = m + 3 * (first + u);
        mean[u] = of[0], c[u] = of[1], d[u] = of[2];
        r[u] = band.statistic(rstd + s, first + u);
        rc[u] = r[u] * band.statistic(corr_dot + s, first + u);
      }
      rows([&](int u, auto get, auto put) {
        const Vec<T> x = get(xhat), p = r[u] * (get(v) - mean[u] - x * c[u]);
        const Vec<T> y = -rc[u] * p - r[u] * (get(xhat_dot) * c[u] + x * d[u]);
        put(out, add ? get(out) + y : y);
      });
    });
  });
  return kOk;
}

#define METAFAST_INSTANTIATE(name)                \
  template int name<float>(const Args&) noexcept; \
  template int name<double>(const Args&) noexcept;
METAFAST_INSTANTIATE(standardize)
METAFAST_INSTANTIATE(moments)
METAFAST_INSTANTIATE(join_moments)
METAFAST_INSTANTIATE(project)
METAFAST_INSTANTIATE(project_tangent)

}  // namespace metafast::kernels::METAFAST_ISA
