#include "gemm.hpp"

#include "pack.hpp"
#include "tile.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

constexpr int64_t kDepth =
    512;  // k a tile runs before C is touched: a strip of B of this depth stays in cache

template <class T>
struct Matrix {
  T* p;
  int64_t bs, rs, cs;
  Matrix batch(int64_t b) const { return {p + b * bs, bs, rs, cs}; }
  Matrix transposed() const { return {p, bs, cs, rs}; }
  Matrix at(int64_t r, int64_t c) const { return {p + r * rs + c * cs, bs, rs, cs}; }
};

// One product, after the operands are turned so that n lies together in C wherever that can be had.
template <class T>
struct Product {
  int64_t M, N, K;
  Matrix<const T> A, B;
  Matrix<T> C;
  const T* bias;
  bool bias_by_row;
  bool add;
};

struct Sizes {
  int64_t batch, M, N, K, a_rs, a_cs, b_rs, b_cs, c_rs, c_cs;
  bool turned;      // computes the transposed product
  bool stage;       // C has no unit stride: through scratch
  bool pack;        // B is copied into strips
  int64_t vectors;  // of a strip
  int64_t width;    // elements of a strip

  template <class T>
  static Sizes of(const int64_t* i) {
    Sizes s{i[0], i[1], i[2], i[3], i[5], i[6], i[8], i[9], i[11], i[12], false, false, false, 0, 0};
    const bool column = s.N == 1 && s.M > 1;
    s.turned = s.c_rs == 1 && (column ? s.a_rs == 1 : s.c_cs != 1) && s.M > 1;
    if (s.turned) {
      swap(s.M, s.N), swap(s.a_rs, s.b_cs), swap(s.a_cs, s.b_rs), swap(s.c_rs, s.c_cs);
    }
    s.stage = s.c_cs != 1 && s.N > 1;
    const int64_t vectors = (s.N + kLanes<T> - 1) / kLanes<T>;
    s.vectors = strip_vectors(s.M, vectors);
    s.width = s.vectors * kLanes<T>;
    const bool big = s.M > 64 && s.K * s.N * static_cast<int64_t>(sizeof(T)) > 131072;
    s.pack = (s.b_cs != 1 && s.N > 1) || big;
    return s;
  }

  static void swap(int64_t& a, int64_t& b) {
    const int64_t t = a;
    a = b, b = t;
  }

  static int64_t strip_vectors(int64_t M, int64_t total) {
    if (total <= 1) return 1;
    if (total == 3) return 3;
    for (int v = kMaxTileVectors; v > 2; --v)
      if (M <= max_tile_rows(v) && total >= v) return v;
    return 2;
  }

  int64_t depth() const { return min64(K, kDepth); }
  int64_t packed_elements() const { return pack ? round_up(N, width) * depth() : 0; }
  int64_t staged_elements() const { return stage ? M * N : 0; }
};

template <class T>
void pack_strips(const Product<T>& p, const Sizes& s, int64_t k, int64_t depth, T* packed) {
  for (int64_t n = 0; n < p.N; n += s.width, packed += s.width * depth)
    pack_rows<T>(p.B.at(k, n).p, p.B.rs, p.B.cs, depth, min64(s.width, p.N - n), s.width,
                 [&](int64_t row) { return packed + row * s.width; });
}

// Rows [m.begin, m.end) and the columns of p; n lies together in C.
template <class T>
void multiply(const Product<T>& p, const Sizes& s, T* packed) {
  constexpr int L = kLanes<T>;
  const int64_t zero = 0;
  for (int64_t k = 0; k < p.K; k += kDepth) {
    const int64_t depth = min64(kDepth, p.K - k);
    const bool last_depth = k + depth == p.K;
    if (s.pack) pack_strips(p, s, k, depth, packed);
    for (int64_t n = 0; n < p.N; n += s.width) {
      const int64_t columns = min64(s.width, p.N - n), vectors = (columns + L - 1) / L;
      TileCall<T> call{};
      call.a = p.A.at(0, k).p, call.a_rs = p.A.rs, call.a_cs = p.A.cs;
      call.segment = &zero, call.segments = 1, call.length = depth;
      call.b = s.pack ? packed + n * depth : p.B.at(k, n).p;
      call.b_rs = s.pack ? s.width : p.B.rs;
      call.c = p.C.at(0, n).p, call.c_rs = p.C.rs;
      call.bias = last_depth && p.bias && !p.bias_by_row ? p.bias + n : nullptr;
      call.add = p.add || k > 0;
      call.last = columns - (vectors - 1) * L;
      run_strip<T>(call, p.M, vectors);
    }
  }
}

template <class T>
void without_depth(const Product<T>& p) {
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t n = 0; n < p.N; ++n) {
      T& c = *p.C.at(m, n).p;
      const T value = p.bias ? p.bias[p.bias_by_row ? m : n] : T(0);
      c = p.add ? c + value : value;
    }
}

template <class T>
void run_product(Product<T> p, const Sizes& s, T* scratch) {
  if (p.K == 0) return without_depth(p);
  T* packed = scratch + s.staged_elements();
  if (s.stage) {
    Product<T> staged = p;
    staged.C = {scratch, 0, p.N, 1}, staged.add = false;
    multiply(staged, s, packed);
    for (int64_t m = 0; m < p.M; ++m)
      for (int64_t n = 0; n < p.N; ++n) {
        T& c = *p.C.at(m, n).p;
        c = p.add ? c + scratch[m * p.N + n] : scratch[m * p.N + n];
      }
  } else {
    multiply(p, s, packed);
  }
  if (p.bias && p.bias_by_row)
    for (int64_t m = 0; m < p.M; ++m)
      for (int64_t n = 0; n < p.N; ++n) *p.C.at(m, n).p += p.bias[m];
}

template <class T>
Product<T> part_of(Product<T> p, const Sizes& s, int part, int parts) {
  const bool by_columns = p.N >= p.M;
  const Range r = by_columns ? share(p.N, part, parts, s.width) : share(p.M, part, parts);
  if (by_columns) {
    p.B = p.B.at(0, r.begin), p.C = p.C.at(0, r.begin), p.N = r.end - r.begin;
    if (p.bias && !p.bias_by_row) p.bias += r.begin;
  } else {
    p.A = p.A.at(r.begin, 0), p.C = p.C.at(r.begin, 0), p.M = r.end - r.begin;
    if (p.bias && p.bias_by_row) p.bias += r.begin;
  }
  return p;
}

}  // namespace

template <class T>
int64_t gemm_scratch(const int64_t* ints) noexcept {
  const Sizes s = Sizes::of<T>(ints);
  return (s.packed_elements() + s.staged_elements()) * static_cast<int64_t>(sizeof(T));
}

template <class T>
int gemm(const Args& a) noexcept {
  const Sizes s = Sizes::of<T>(a.i);
  const int64_t* i = a.i;
  Matrix<const T> A{static_cast<const T*>(a.ptr[0]), i[4], i[5], i[6]};
  Matrix<const T> B{static_cast<const T*>(a.ptr[1]), i[7], i[8], i[9]};
  Matrix<T> C{static_cast<T*>(a.ptr[2]), i[10], i[11], i[12]};
  const T* bias = i[14] ? static_cast<const T*>(a.ptr[3]) : nullptr;
  if (s.M == 0 || s.N == 0) return kOk;
  const bool split_batch = s.batch >= a.parts;
  const Range batches = split_batch ? share(s.batch, a.part, a.parts) : Range{0, s.batch};
  for (int64_t b = batches.begin; b < batches.end; ++b) {
    Product<T> p{s.M, s.N, s.K, A.batch(b), B.batch(b), C.batch(b), bias, s.turned, i[13] != 0};
    if (s.turned) {
      p.A = B.batch(b).transposed(), p.B = A.batch(b).transposed(), p.C = C.batch(b).transposed();
    }
    if (!split_batch) p = part_of(p, s, a.part, a.parts);
    run_product(p, s, reinterpret_cast<T*>(a.scratch));
  }
  return kOk;
}

template int gemm<float>(const Args&) noexcept;
template int gemm<double>(const Args&) noexcept;
template int64_t gemm_scratch<float>(const int64_t*) noexcept;
template int64_t gemm_scratch<double>(const int64_t*) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
