#include "gemm.hpp"

#include "lanes.hpp"
#include "pack.hpp"
#include "sums.hpp"
#include "tile.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

// k a tile runs before C is touched: keeps a strip of B in cache and the chains of roundings short.
constexpr int64_t kDepth = 192;

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
  bool dots;        // element by element, vectors along k, which lies together in A and B
  bool pack;        // B is copied into strips
  int64_t vectors;  // of a strip
  int64_t width;    // elements of a strip
  bool lanes;       // the matrices of the batch lie in the lanes of vectors

  template <class T>
  static Sizes of(const int64_t* i) {
    Sizes s{i[0],
            i[1],
            i[2],
            i[3],
            i[5],
            i[6],
            i[8],
            i[9],
            i[11],
            i[12],
            false,
            false,
            false,
            false,
            0,
            0,
            lie_in_lanes<T>(i)};
    if (s.lanes) return s;
    const bool column = s.N == 1 && s.M > 1;
    s.turned = s.c_rs == 1 && (column ? s.a_rs == 1 : s.c_cs != 1) && s.M > 1;
    if (s.turned) {
      swap(s.M, s.N), swap(s.a_rs, s.b_cs), swap(s.a_cs, s.b_rs), swap(s.c_rs, s.c_cs);
    }
    s.dots = s.a_cs == 1 && s.b_rs == 1 && few_elements<T>(s.M, s.N, s.K);
    s.stage = s.c_cs != 1 && s.N > 1 && !s.dots;
    const int64_t vectors = (s.N + kLanes<T> - 1) / kLanes<T>;
    s.vectors = strip_vectors(s.M, vectors);
    s.width = s.vectors * kLanes<T>;
    const bool big = s.M > 64 && s.K * s.N * static_cast<int64_t>(sizeof(T)) > 131072;
    s.pack = ((s.b_cs != 1 && s.N > 1) || big) && !s.dots;
    return s;
  }

  // Whether the batch lies together in C and in A or B, and is shared by the other where it does not.
  template <class T>
  static bool lie_in_lanes(const int64_t* i) {
    const int64_t a = i[4], b = i[7], c = i[10];
    const bool fits = i[0] > 0 && i[0] % kLanes<T> == 0 && c == 1 && (a == 1 || b == 1);
    return fits && (a == 0 || a == 1) && (b == 0 || b == 1) && !i[14];
  }

  // Whether dot products beat tiles: adding up the lanes costs an element what 2 L steps along k do, and a
  // tile pays for the unused lanes of a vector of columns and for transposing B.
  template <class T>
  static bool few_elements(int64_t M, int64_t N, int64_t K) {
    constexpr int64_t L = kLanes<T>;
    return K > 1 && L > 2 && (M <= 2 ? K >= L : N * (K + 4 * L) <= L * K);
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
  const int64_t width = s.width;
  for (int64_t n = 0; n < p.N; n += width, packed += width * depth)
    pack_rows<T>(p.B.at(k, n).p, p.B.rs, p.B.cs, depth, min64(width, p.N - n), width,
                 [packed, width](int64_t row) { return packed + row * width; });
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

// Columns n..n+columns of rows m.. of p, as many rows as make a vector of elements.
template <class T, int columns>
void dot_block(const Product<T>& p, int64_t m, int64_t n) {
  constexpr int L = kLanes<T>, rows = L / columns;
  const T *a[rows], *b[columns];
  METAFAST_UNROLL for (int r = 0; r < rows; ++r) a[r] = p.A.p + min64(m + r, p.M - 1) * p.A.rs;
  METAFAST_UNROLL for (int c = 0; c < columns; ++c) b[c] = p.B.p + (n + c) * p.B.cs;
  Vec<T> acc[L];
  METAFAST_UNROLL for (int e = 0; e < L; ++e) acc[e] = Vec<T>{};
  auto step = [&](auto get) {
    Vec<T> y[columns];
    METAFAST_UNROLL for (int c = 0; c < columns; ++c) y[c] = get(b[c]);
    METAFAST_UNROLL for (int r = 0; r < rows; ++r) {
      const Vec<T> x = get(a[r]);
      METAFAST_UNROLL for (int c = 0; c < columns; ++c) acc[r * columns + c] =
          fma<T>(x, y[c], acc[r * columns + c]);
    }
  };
  int64_t k = 0;
  for (; k + L <= p.K; k += L) step([&](const T* x) { return load(x + k); });
  if (k < p.K) {
    const Mask<T> rest(p.K - k);
    step([&](const T* x) { return load(x + k, rest); });
  }
  T sums[L];
  store(sums, join_lanes<T, Add<T>>(acc));
  for (int r = 0; r < rows && m + r < p.M; ++r)
    for (int c = 0; c < columns; ++c) {
      T& y = *p.C.at(m + r, n + c).p;
      const T sum = sums[r * columns + c] + (p.bias && !p.bias_by_row ? p.bias[n + c] : T(0));
      y = p.add ? y + sum : sum;
    }
}

template <class T, int columns>
void dot_columns(const Product<T>& p, int64_t n) {
  if constexpr (columns <= kLanes<T>)
    for (int64_t m = 0; m < p.M; m += kLanes<T> / columns) dot_block<T, columns>(p, m, n);
}

template <class T>
void multiply_by_dots(const Product<T>& p) {
  if (p.M == 0 || p.N == 0) return;
  constexpr int64_t most = kLanes<T> < 5 ? kLanes<T> : 5;
  const int64_t width = p.M == 1 ? most : (p.N + (p.N + most - 1) / most - 1) / ((p.N + most - 1) / most);
  for (int64_t n = 0; n < p.N;) {
    const int64_t columns = min64(width, p.N - n);
    switch (columns) {
      case 1:
        dot_columns<T, 1>(p, n);
        break;
      case 2:
        dot_columns<T, 2>(p, n);
        break;
      case 3:
        dot_columns<T, 3>(p, n);
        break;
      case 4:
        dot_columns<T, 4>(p, n);
        break;
      default:
        dot_columns<T, 5>(p, n);
    }
    n += columns;
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
  if (s.dots) {
    multiply_by_dots(p);
  } else if (s.stage) {
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

// The share of a product whose batch lies in lanes: rows of every vector of it.
template <class T>
void run_lanes(const Args& a, const Sizes& s) {
  const int64_t* i = a.i;
  const Range rows = share(s.M, a.part, a.parts);
  const T *x = static_cast<const T*>(a.ptr[0]), *y = static_cast<const T*>(a.ptr[1]);
  T* z = static_cast<T*>(a.ptr[2]);
  for (int64_t b = 0; b < s.batch; b += kLanes<T>) {
    const LaneMatrix<const T> A{x + b * i[4] + rows.begin * s.a_rs, s.a_rs, s.a_cs, i[4] == 1};
    const LaneMatrix<const T> B{y + b * i[7], s.b_rs, s.b_cs, i[7] == 1};
    const LaneMatrix<T> C{z + b + rows.begin * s.c_rs, s.c_rs, s.c_cs, true};
    multiply_lanes(LaneProduct<T>{rows.end - rows.begin, s.N, s.K, A, B, C, i[13] != 0});
  }
}

}  // namespace

template <class T>
int64_t gemm_scratch(const int64_t* ints) noexcept {
  const Sizes s = Sizes::of<T>(ints);
  return (s.packed_elements() + s.staged_elements()) * static_cast<int64_t>(sizeof(T));
}

template <class T>
int64_t gemm_prepared_bytes(const int64_t*) noexcept {
  return sizeof(Sizes);
}

template <class T>
void gemm_prepare(const int64_t* ints, const double*, std::byte* place) noexcept {
  *reinterpret_cast<Sizes*>(place) = Sizes::of<T>(ints);
}

template <class T>
int gemm(const Args& a) noexcept {
  const Sizes& s = *reinterpret_cast<const Sizes*>(a.prepared);
  const int64_t* i = a.i;
  Matrix<const T> A{static_cast<const T*>(a.ptr[0]), i[4], i[5], i[6]};
  Matrix<const T> B{static_cast<const T*>(a.ptr[1]), i[7], i[8], i[9]};
  Matrix<T> C{static_cast<T*>(a.ptr[2]), i[10], i[11], i[12]};
  const T* bias = i[14] ? static_cast<const T*>(a.ptr[3]) : nullptr;
  if (s.M == 0 || s.N == 0) return kOk;
  if (s.lanes && s.K > 0) return run_lanes<T>(a, s), kOk;
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
template int64_t gemm_prepared_bytes<float>(const int64_t*) noexcept;
template int64_t gemm_prepared_bytes<double>(const int64_t*) noexcept;
template void gemm_prepare<float>(const int64_t*, const double*, std::byte*) noexcept;
template void gemm_prepare<double>(const int64_t*, const double*, std::byte*) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
