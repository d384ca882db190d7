#include "normalise.hpp"

#include "math.hpp"
#include "sums.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

// The same formulas serve two layouts. Columns: a vector holds neighbouring `inner` positions of one row,
// statistics are vectors. Runs (inner = 1): a vector holds neighbouring `reduce` positions, statistics are
// equal in all lanes.

// A vector of columns over all rows.
template <class T>
struct Columns {
  int64_t at, reduce, inner;
  Mask<T> mask;

  template <int Q, class Term>
  METAFAST_INLINE void means(Vec<T>* out, Term term) const {
    join_rows<T, Q>(out, reduce, [&](int64_t r, Vec<T>* q) { term(getter(r), q); });
    for (int q = 0; q < Q; ++q) out[q] /= splat(static_cast<T>(reduce));
  }
  template <class F>
  METAFAST_INLINE void each(F f) const {
    for (int64_t r = 0; r < reduce; ++r)
      f(getter(r), [&](T* p, Vec<T> v) { store(p + at + r * inner, v, mask); });
  }
  METAFAST_INLINE Vec<T> statistic(const T* p) const { return load(p, mask); }
  METAFAST_INLINE void set_statistic(T* p, Vec<T> v) const { store(p, v, mask); }

 private:
  METAFAST_INLINE auto getter(int64_t r) const {
    const int64_t offset = at + r * inner;
    return [offset, this](const T* p) { return load(p + offset, mask); };
  }
};

// One run.
template <class T>
struct Run {
  int64_t at, reduce;

  template <int Q, class Term>
  METAFAST_INLINE void means(Vec<T>* out, Term term) const {
    T sum[Q];
    sum_run<T, Q>(sum, reduce,
                  [&](auto get, Vec<T>* q) { term([&](const T* p) { return get(p + at); }, q); });
    for (int q = 0; q < Q; ++q) out[q] = splat(sum[q] / static_cast<T>(reduce));
  }
  template <class F>
  METAFAST_INLINE void each(F f) const {
    for_run<T>(reduce, [&](auto get, auto put) {
      f([&](const T* p) { return get(p + at); }, [&](T* p, Vec<T> v) { put(p + at, v); });
    });
  }
  METAFAST_INLINE Vec<T> statistic(const T* p) const { return splat(*p); }
  METAFAST_INLINE void set_statistic(T* p, Vec<T> v) const { *p = v[0]; }
};

// Calls f(group, position of its statistics) for every group of this part.
template <class T, class F>
METAFAST_INLINE void for_groups(const Args& a, F f) {
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
  for (int64_t k = mine.begin; k < mine.end; ++k) {
    const int64_t o = k / vectors, column = k % vectors * L;
    f(Columns<T>{o * reduce * inner + column, reduce, inner, Mask<T>(min64(L, inner - column))},
      o * inner + column);
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
  for_groups<T>(a, [&](const auto& g, int64_t s) {
    Vec<T> m[1], v[1];
    g.template means<1>(m, [&](auto get, Vec<T>* q) { q[0] = get(x); });
    g.template means<1>(v, [&](auto get, Vec<T>* q) {
      const Vec<T> d = get(x) - m[0];
      q[0] = d * d;
    });
    const Vec<T> r = splat(T(1)) / sqrt_v<T>(v[0] + eps);
    g.each([&](auto get, auto put) { put(xhat, (get(x) - m[0]) * r); });
    g.set_statistic(rstd + s, r), g.set_statistic(mean + s, m[0]), g.set_statistic(var + s, v[0]);
  });
  return kOk;
}

template <class T>
int project(const Args& a) noexcept {
  const T *v = input<T>(a, 0), *xhat = input<T>(a, 1), *rstd = input<T>(a, 2);
  T *out = output<T>(a, 3), *corr = output<T>(a, 4);
  const bool add = a.i[3] != 0;
  for_groups<T>(a, [&](const auto& g, int64_t s) {
    Vec<T> m[2];
    g.template means<2>(m, [&](auto get, Vec<T>* q) { q[0] = get(v), q[1] = q[0] * get(xhat); });
    const Vec<T> r = g.statistic(rstd + s);
    g.each([&](auto get, auto put) {
      const Vec<T> p = r * (get(v) - m[0] - get(xhat) * m[1]);
      put(out, add ? get(out) + p : p);
    });
    g.set_statistic(corr + s, m[1]);
  });
  return kOk;
}

template <class T>
int project_tangent(const Args& a) noexcept {
  const T *v = input<T>(a, 0), *xhat = input<T>(a, 1), *xhat_dot = input<T>(a, 2), *rstd = input<T>(a, 3),
          *corr_dot = input<T>(a, 4);
  T* out = output<T>(a, 5);
  const bool add = a.i[3] != 0;
  for_groups<T>(a, [&](const auto& g, int64_t s) {
    Vec<T> m[3];
    g.template means<3>(
        m, [&](auto get, Vec<T>* q) { q[0] = get(v), q[1] = q[0] * get(xhat), q[2] = q[0] * get(xhat_dot); });
    const Vec<T> r = g.statistic(rstd + s), rc = r * g.statistic(corr_dot + s);
    g.each([&](auto get, auto put) {
      const Vec<T> x = get(xhat), p = r * (get(v) - m[0] - x * m[1]);
      const Vec<T> y = -rc * p - r * (get(xhat_dot) * m[1] + x * m[2]);
      put(out, add ? get(out) + y : y);
    });
  });
  return kOk;
}

#define METAFAST_INSTANTIATE(name)                \
  template int name<float>(const Args&) noexcept; \
  template int name<double>(const Args&) noexcept;
METAFAST_INSTANTIATE(standardize)
METAFAST_INSTANTIATE(project)
METAFAST_INSTANTIATE(project_tangent)

}  // namespace metafast::kernels::METAFAST_ISA
