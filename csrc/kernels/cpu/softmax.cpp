#include "softmax.hpp"

#include "math.hpp"
#include "sums.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

constexpr int64_t kShort = 64;  // rows up to this long are taken a vector of rows at a time

// A vector of neighbouring problems, element r of which lies at p[r * stride].
template <class T, class Get, class Put>
METAFAST_INLINE void columns(int64_t reduce, Get get, Put put) {
  Vec<T> top = get(0);
  for (int64_t r = 1; r < reduce; ++r) top = max_nan<T>(top, get(r));
  Vec<T> sum{};
  for (int64_t r = 0; r < reduce; ++r) sum += exp_v(get(r) - top);
  const Vec<T> shift = log_v(sum);
  for (int64_t r = 0; r < reduce; ++r) put(r, (get(r) - top) - shift);
}

// `rows` short runs at once, turned so that a vector holds one position of all of them.
template <class T>
void short_runs(const T* x, T* y, int64_t reduce, int64_t rows) {
  constexpr int L = kLanes<T>;
  T turned[kShort * L];
  store(turned, Vec<T>{});
  for (int64_t r = 0; r < reduce; ++r)
    for (int j = 0; j < L; ++j) turned[r * L + j] = j < rows ? x[j * reduce + r] : T(0);
  columns<T>(
      reduce, [&](int64_t r) { return load(turned + r * L); },
      [&](int64_t r, Vec<T> v) { store(turned + r * L, v); });
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t r = 0; r < reduce; ++r) y[j * reduce + r] = turned[r * L + j];
}

template <class T>
void long_run(const T* x, T* y, int64_t n) {
  constexpr int L = kLanes<T>;
  Vec<T> top_lanes = splat(x[0]);
  int64_t k = 0;
  for (; k + L <= n; k += L) top_lanes = max_nan<T>(top_lanes, load(x + k));
  T top = max_lanes<T>(top_lanes);
  for (; k < n; ++k) top = max_nan<T>(splat(top), splat(x[k]))[0];
  T sum;
  sum_run<T, 1>(&sum, n, [&](auto get, Vec<T>* q) { q[0] = exp_v(get(x) - splat(top)); });
  const Vec<T> shift = log_v(splat(sum));
  for_run<T>(n, [&](auto get, auto put) { put(y, (get(x) - splat(top)) - shift); });
}

}  // namespace

template <class T>
int log_softmax(const Args& a) noexcept {
  constexpr int L = kLanes<T>;
  const int64_t outer = a.i[0], reduce = a.i[1], inner = a.i[2];
  const T* x = static_cast<const T*>(a.ptr[0]);
  T* y = static_cast<T*>(a.ptr[1]);
  if (reduce == 0) return kOk;
  if (inner == 1 && reduce <= kShort) {
    const Range mine = share(outer, a.part, a.parts);
    for (int64_t o = mine.begin; o < mine.end; o += L)
      short_runs(x + o * reduce, y + o * reduce, reduce, min64(L, mine.end - o));
    return kOk;
  }
  if (inner == 1) {
    const Range mine = share(outer, a.part, a.parts);
    for (int64_t o = mine.begin; o < mine.end; ++o) long_run(x + o * reduce, y + o * reduce, reduce);
    return kOk;
  }
  const int64_t vectors = (inner + L - 1) / L;
  const Range mine = share(outer * vectors, a.part, a.parts);
  for (int64_t k = mine.begin; k < mine.end; ++k) {
    const int64_t column = k % vectors * L, at = k / vectors * reduce * inner + column;
    const Mask<T> mask(min64(L, inner - column));
    columns<T>(
        reduce, [&](int64_t r) { return load(x + at + r * inner, mask); },
        [&](int64_t r, Vec<T> v) { store(y + at + r * inner, v, mask); });
  }
  return kOk;
}

template int log_softmax<float>(const Args&) noexcept;
template int log_softmax<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
