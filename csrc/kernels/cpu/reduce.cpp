#include "reduce.hpp"

#include "sums.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

// Dimensions with unit ones dropped, the longest stride first and neighbours merged; strides of one or two
// operands.
struct Dims {
  int rank = 0;
  int64_t size[kReduceRank], in[kReduceRank], out[kReduceRank];
  int64_t count = 1, outer = 1;  // of all; of all but the last

  Dims(int64_t n, const int64_t* dims, const int64_t* in_strides, const int64_t* out_strides) {
    int order[kReduceRank];
    int used = 0;
    for (int d = 0; d < n; ++d) {
      count *= dims[d];
      if (dims[d] == 1) continue;
      int at = used++;
      for (; at > 0 && in_strides[order[at - 1]] < in_strides[d]; --at) order[at] = order[at - 1];
      order[at] = d;
    }
    for (int k = 0; k < used; ++k) {
      const int d = order[k];
      const int64_t out_stride = out_strides ? out_strides[d] : 0;
      const bool merges =
          rank > 0 && in[rank - 1] == in_strides[d] * dims[d] && out[rank - 1] == out_stride * dims[d];
      if (!merges) size[rank++] = 1;
      size[rank - 1] *= dims[d], in[rank - 1] = in_strides[d], out[rank - 1] = out_stride;
    }
    if (rank == 0) rank = 1, size[0] = 1, in[0] = 0, out[0] = 0;
    for (int d = 0; d < rank - 1; ++d) outer *= size[d];
  }

  int64_t inner() const { return size[rank - 1]; }
  int64_t inner_in() const { return in[rank - 1]; }
  int64_t inner_out() const { return out[rank - 1]; }
  int64_t offset(int64_t row, const int64_t* strides) const {  // of a row: all dimensions but the last
    if (row == 0) return 0;
    int64_t at = 0;
    for (int d = rank - 2; d >= 0; --d) at += row % size[d] * strides[d], row /= size[d];
    return at;
  }
};

// Numbers k as pairs: k / n, k % n, without a division for each.
struct Pair {
  int64_t n, row, at;
  Pair(int64_t k, int64_t n) : n(n), row(k / n), at(k % n) {}
  void operator++() {
    if (++at == n) at = 0, ++row;
  }
};

template <class T>
METAFAST_INLINE Vec<T> load_strided(const T* p, int64_t stride, int64_t n) {
  Vec<T> v{};
  for (int i = 0; i < kLanes<T>; ++i)
    if (i < n) v[i] = p[i * stride];
  return v;
}

template <class T, class Join>
struct Reduction {
  static constexpr int L = kLanes<T>;
  const T* in;
  T* out;
  const Dims kept, reduced;
  T scale;
  bool add;

  void write(T* y, T value) const { *y = add ? *y + scale * value : scale * value; }

  // Q vectors of kept elements at once, over all that is reduced: load_at(p, q) loads vector q of those from p on.
  template <int Q, class Load>
  METAFAST_INLINE void columns(Vec<T>* total, const T* p, Load load_at) const {
    const int64_t rows = reduced.inner(), stride = reduced.inner_in(), outer = reduced.outer;
    const auto join = [&](Vec<T>* joined, const T* base) {
      join_rows<T, Q, Join>(joined, rows, [&](int64_t r, Vec<T>* v) {
        METAFAST_UNROLL for (int q = 0; q < Q; ++q) v[q] = load_at(base + r * stride, q);
      });
    };
    if (outer == 1) return join(total, p);
    Pairwise<T, Q, Join> pairwise;
    for (int64_t o = 0; o < outer; ++o) {
      Vec<T> part[Q];
      join(part, p + reduced.offset(o, reduced.in));
      pairwise.push(part);
    }
    pairwise.finish(total, Join::empty);
  }

  // What four accumulators of each of so many vectors leave room for.
  static constexpr int kTogether = kVecRegisters / 8;

  void keep_inner(int part, int parts) const {
    const int64_t inner = kept.inner(), vectors = (inner + L - 1) / L;
    const bool dense = kept.inner_in() == 1 && kept.inner_out() == 1;
    const Range mine = share(kept.outer * vectors, part, parts);
    for (int64_t k = mine.begin, done; k < mine.end; k += done) {
      const int64_t row = k / vectors, at = k % vectors * L;
      const bool several = dense && at + kTogether * L <= inner && k + kTogether <= mine.end;
      done = several ? kTogether : 1;
      const T* p = in + kept.offset(row, kept.in) + at * kept.inner_in();
      T* y = out + kept.offset(row, kept.out) + at * kept.inner_out();
      several ? keep_several(y, p) : keep_one(y, p, min64(L, inner - at));
    }
  }

  void keep_several(T* y, const T* p) const {
    Vec<T> v[kTogether];
    columns<kTogether>(v, p, [](const T* x, int q) { return load(x + q * L); });
    METAFAST_UNROLL for (int q = 0; q < kTogether; ++q) {
      const Vec<T> scaled = v[q] * splat(scale);
      store(y + q * L, add ? scaled + load(y + q * L) : scaled);
    }
  }

  // n kept elements, up to a vector.
  void keep_one(T* y, const T* p, int64_t n) const {
    const int64_t in_stride = kept.inner_in(), out_stride = kept.inner_out();
    const Mask<T> mask(n);
    Vec<T> v;
    if (in_stride == 1 && n == L)
      columns<1>(&v, p, [](const T* x, int) { return load(x); });
    else if (in_stride == 1)
      columns<1>(&v, p, [&](const T* x, int) { return load(x, mask); });
    else
      columns<1>(&v, p, [&](const T* x, int) { return load_strided(x, in_stride, n); });
    if (out_stride == 1) {
      v *= splat(scale);
      store(y, add ? v + load(y, mask) : v, mask);
    } else {
      for (int64_t j = 0; j < n; ++j) write(y + j * out_stride, v[j]);
    }
  }

  // One kept element at a time, vectors along what is reduced.
  T run(const T* p) const {
    const int64_t n = reduced.inner(), stride = reduced.inner_in(), whole = n / L;
    Pairwise<T, 1, Join> pairwise;
    for (int64_t o = 0; o < reduced.outer; ++o) {
      const T* base = p + reduced.offset(o, reduced.in);
      Vec<T> part[1];
      if (stride == 1)
        join_rows<T, 1, Join>(part, whole, [&](int64_t r, Vec<T>* q) { q[0] = load(base + r * L); });
      else
        join_rows<T, 1, Join>(part, whole, [&](int64_t r, Vec<T>* q) {
          q[0] = load_strided(base + r * L * stride, stride, L);
        });
      if (n % L) {
        Vec<T> rest = load_strided(base + whole * L * stride, stride, n % L);
        for (int j = static_cast<int>(n % L); j < L; ++j) rest[j] = Join::empty;
        part[0] = Join::of(part[0], rest);
      }
      pairwise.push(part);
    }
    Vec<T> total[1];
    pairwise.finish(total, Join::empty);
    if constexpr (Join::empty == T(0))
      return sum_lanes<T>(total[0]);
    else
      return max_lanes<T>(total[0]);
  }

  void reduce_inner(int part, int parts) const {
    const Range mine = share(kept.count, part, parts);
    Pair place(mine.begin, kept.inner());
    for (int64_t k = mine.begin; k < mine.end; ++k, ++place)
      write(out + kept.offset(place.row, kept.out) + place.at * kept.inner_out(),
            run(in + kept.offset(place.row, kept.in) + place.at * kept.inner_in()));
  }

  // A vector of kept elements, each over the lanes of one vector that lies next to its neighbour's.
  void reduce_lanes(int part, int parts) const {
    const int64_t inner = kept.inner(), vectors = (inner + L - 1) / L;
    const Range mine = share(kept.outer * vectors, part, parts);
    Pair place(mine.begin, vectors);
    for (int64_t k = mine.begin; k < mine.end; ++k, ++place) {
      const int64_t at = place.at * L, n = min64(L, inner - at);
      const T* p = in + kept.offset(place.row, kept.in) + at * kept.inner_in();
      Vec<T> v[L];
      METAFAST_UNROLL for (int j = 0; j < L; ++j) v[j] = load(p + min64(j, n - 1) * kept.inner_in());
      T* y = out + kept.offset(place.row, kept.out) + at;
      const Mask<T> mask(n);
      const Vec<T> joined = join_lanes<T, Join>(v) * splat(scale);
      store(y, add ? joined + load(y, mask) : joined, mask);
    }
  }

  void write_empty(int part, int parts) const {
    const Range mine = share(kept.count, part, parts);
    for (int64_t k = mine.begin; k < mine.end; ++k)
      write(out + kept.offset(k / kept.inner(), kept.out) + k % kept.inner() * kept.inner_out(), Join::empty);
  }

  void go(int part, int parts) const {
    if (kept.count == 0) return;
    if (reduced.count == 0) return write_empty(part, parts);
    if (reduced.count == L && reduced.inner() == L && reduced.inner_in() == 1 && kept.inner() > 1 &&
        kept.inner_out() == 1)
      return reduce_lanes(part, parts);
    const bool along_reduced = reduced.inner_in() == 1 && reduced.inner() > 1;
    const bool along_kept = kept.inner_in() == 1 || (!along_reduced && kept.inner() >= reduced.inner());
    along_kept && !(kept.inner() == 1) ? keep_inner(part, parts) : reduce_inner(part, parts);
  }
};

}  // namespace

template <class T>
int reduce(const Args& a) noexcept {
  const int64_t nk = a.i[0], nr = a.i[1];
  const int64_t *kdims = a.i + 2, *rdims = kdims + nk, *in_k = rdims + nr, *in_r = in_k + nk,
                *out_k = in_r + nr;
  const Dims kept(nk, kdims, in_k, out_k), reduced(nr, rdims, in_r, nullptr);
  const T* in = static_cast<const T*>(a.ptr[0]);
  T* out = static_cast<T*>(a.ptr[1]);
  const bool add = out_k[nk] != 0;
  if (out_k[nk + 1] == 0)
    Reduction<T, Add<T>>{in, out, kept, reduced, static_cast<T>(a.f[0]), add}.go(a.part, a.parts);
  else
    Reduction<T, Max<T>>{in, out, kept, reduced, static_cast<T>(a.f[0]), add}.go(a.part, a.parts);
  return kOk;
}

template int reduce<float>(const Args&) noexcept;
template int reduce<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
