#include "gemm.hpp"

#include "cut.hpp"
#include "dots.hpp"
#include "lanes.hpp"
#include "pack.hpp"
#include "tile.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

// With so few rows, so long for each of them, B is better read along k than packed: measured on AVX2.
constexpr int64_t kFewRows = 12, kLongRows = 32;

// Of B and of C: what half a first-level cache holds, and what a second-level one has to share.
constexpr int64_t kNearBytes = 24576, kFarBytes = 262144;

// What a call is, after the operands are turned so that n lies together in C wherever that can be had.
struct Sizes {
  int64_t batch, M, N, K, a_bs, a_rs, a_cs, b_bs, b_rs, b_cs, c_bs, c_rs, c_cs;
  bool add, has_bias, pair;
  int64_t scaled;   // 1, -1: C = D + or - s A B; else 0
  bool turned;      // computes the transposed product, whose bias goes with the rows
  bool stage;       // C has no unit stride: through scratch
  bool dots;        // element by element, vectors along k, which lies together in A and B
  DotShape blocks;  // of those
  bool pack;        // B is copied into strips
  int64_t vectors;  // of a strip
  int64_t width;    // elements of a strip
  int64_t rows;     // that all strips pass before the next: M, or those of a tile
  bool lanes;       // the matrices of the batch lie in the lanes of vectors
  int64_t columns;  // of a block of those
  bool apart;       // the two products of a pair

  template <class T>
  static Sizes of(const int64_t* i) {
    Sizes s{};
    s.batch = i[0], s.M = i[1], s.N = i[2], s.K = i[3];
    s.a_bs = i[4], s.a_rs = i[5], s.a_cs = i[6], s.b_bs = i[7], s.b_rs = i[8], s.b_cs = i[9];
    s.c_bs = i[10], s.c_rs = i[11], s.c_cs = i[12];
    s.add = i[13] != 0, s.has_bias = i[14] != 0, s.pair = i[15] != 0;
    s.scaled = i[13] < 2 ? 0 : (i[13] == 2 ? 1 : -1);
    s.lanes = lie_in_lanes<T>(i);
    if (s.lanes) {
      if (lane_width<T>(s.N, s.M).loads < lane_width<T>(s.M, s.N).loads) s.turn();
      s.columns = lane_width<T>(s.M, s.N).columns, s.apart = lanes_apart(s.M, s.N, s.K);
      return s;
    }
    const bool column = s.N == 1 && s.M > 1;
    if (s.c_rs == 1 && (column ? s.a_rs == 1 : s.c_cs != 1) && s.M > 1) s.turn();
    s.dots = s.a_cs == 1 && s.b_rs == 1 && few_elements<T>(s.M, s.N, s.K);
    if (s.dots) s.blocks = dot_shape<T>(s.M, s.N, s.K);
    s.stage = s.c_cs != 1 && s.N > 1 && !s.dots;
    const int64_t vectors = (s.N + kLanes<T> - 1) / kLanes<T>;
    s.vectors = strip_vectors(s.M, vectors);
    s.width = s.vectors * kLanes<T>;
    const bool big = s.M > 64 && s.K * s.N * static_cast<int64_t>(sizeof(T)) > 131072;
    s.pack = ((s.b_cs != 1 && s.N > 1) || (big && !strip_fits<T>(s))) && !s.dots;
    s.rows = whole_rows<T>(s) ? max_tile_rows(static_cast<int>(s.vectors)) : s.M;
    return s;
  }

  void turn() {
    turned = true;
    swap(M, N), swap(a_bs, b_bs), swap(a_rs, b_cs), swap(a_cs, b_rs), swap(c_rs, c_cs);
  }

  // Whether the batch lies together in C and in A or B, and is shared by the other where it does not.
  template <class T>
  static bool lie_in_lanes(const int64_t* i) {
    const int64_t a = i[4], b = i[7], c = i[10];
    const bool fits = i[0] > 0 && i[0] % kLanes<T> == 0 && c == 1 && (a == 1 || b == 1);
    return fits && (a == 0 || a == 1) && (b == 0 || b == 1) && !i[14];
  }

  // Whether dot products beat tiles: adding up the lanes costs an element what 2 L steps along k do, and a
  // tile pays for the unused lanes of a vector of columns and for transposing B, which few rows share.
  template <class T>
  static bool few_elements(int64_t M, int64_t N, int64_t K) {
    constexpr int64_t L = kLanes<T>;
    if (K <= 1 || L <= 2) return false;
    return M <= 2 ? K >= L : N * (K + 4 * L) <= L * K || (M <= kFewRows && K >= kLongRows * M);
  }

  // Whether a first-level cache, of at least 64 sets of 8 lines, holds a strip of B where it lies: rows whose distance
  // is a large power of two of lines, or a multiple of one, meet in few of its sets.
  template <class T>
  static bool strip_fits(const Sizes& s) {
    constexpr int64_t kLine = 64, kSets = 64, kWays = 8;
    int64_t sets = kSets;
    for (int64_t lines = s.b_rs * static_cast<int64_t>(sizeof(T)) / kLine; sets > 1 && lines % 2 == 0;
         lines /= 2)
      sets /= 2;
    return s.depth() * s.vectors <= min64(kSets, sets * s.vectors) * kWays;
  }

  // Whether C is written row after row: where it lies far away and B near, caches see what comes next.
  template <class T>
  static bool whole_rows(const Sizes& s) {
    constexpr int64_t size = sizeof(T);
    return !s.pack && s.scaled && s.K * s.N * size <= kNearBytes && s.M * s.N * size >= kFarBytes;
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

  // A' (0) or B' (1), null without a pair; they are the last operands.
  template <class T>
  const T* pair_operand(const Args& args, int which) const {
    return pair ? static_cast<const T*>(args.ptr[3 + has_bias + 2 * (scaled != 0) + which]) : nullptr;
  }

  int64_t depth() const { return min64(K, kDepth); }
  int64_t strip_elements() const { return pack ? width * depth() : 0; }
  int64_t packed_elements() const { return (1 + pair) * strip_elements(); }
  // B in strips, those of the first `depth` rows first.
  int64_t kept_elements() const { return pack && batch == 1 && !pair ? round_up(N, width) * K : 0; }
  int64_t staged_elements() const { return stage ? M * N : 0; }
};

// One product, or a part of one: M × N of it. The strides are those of Sizes.
template <class T>
struct Product {
  int64_t M, N;
  const T *a, *b;
  const T *more_a, *more_b;  // of the second product of a pair, or null
  T* c;
  const T* bias;  // of these columns (rows where turned), or null
  int64_t from;   // elements from C to what it takes up
  T scale;
};

// A strip of B, from row k and column n on.
template <class T>
void pack_strip(const T* b, const Sizes& s, int64_t k, int64_t depth, int64_t n, int64_t columns, T* packed) {
  pack_rows<T>(b + k * s.b_rs + n * s.b_cs, s.b_rs, s.b_cs, depth, columns, s.width,
               [packed, &s](int64_t row) { return packed + row * s.width; });
}

// c (+)= the product, where n lies together in c. A strip is packed just before all rows of A meet it.
template <class T>
void multiply(const Product<T>& p, const Sizes& s, T* c, int64_t c_rs, bool add, const T* kept, T* packed) {
  constexpr int L = kLanes<T>;
  const int64_t starts[] = {0, s.pair ? p.more_a - p.a : 0};
  T* const more = packed + s.strip_elements();
  const int64_t whole = round_up(p.N, s.width);  // columns of what is kept
  TileCall<T> call{};
  call.a_rs = s.a_rs, call.a_cs = s.a_cs;
  call.segment = starts, call.segments = 1 + s.pair;
  call.b_rs = s.pack ? s.width : s.b_rs;
  call.c_rs = c_rs, call.scale = p.scale;
  for (int64_t k = 0; k < s.K; k += kDepth) {
    const int64_t depth = min64(kDepth, s.K - k);
    const bool last_depth = k + depth == s.K;
    if (s.pair) call.b_gap = (s.pack ? more - packed : p.more_b - p.b) - depth * call.b_rs;
    call.length = depth, call.add = add || k > 0;
    call.from = k > 0 ? 0 : p.from;
    for (int64_t m = 0; m < p.M; m += s.rows) {
      call.a = p.a + m * s.a_rs + k * s.a_cs;
      for (int64_t n = 0; n < p.N; n += s.width) {
        const int64_t columns = min64(s.width, p.N - n), vectors = (columns + L - 1) / L;
        if (kept) {
          call.b = kept + k * whole + n * depth;
        } else if (s.pack) {
          pack_strip(p.b, s, k, depth, n, columns, packed);
          if (s.pair) pack_strip(p.more_b, s, k, depth, n, columns, more);
          call.b = packed;
        } else {
          call.b = p.b + k * s.b_rs + n * s.b_cs;
        }
        call.c = c + m * c_rs + n;
        call.bias = last_depth && p.bias && !s.turned ? p.bias + n : nullptr;
        call.last = columns - (vectors - 1) * L;
        run_strip<T>(call, min64(s.rows, p.M - m), vectors);
      }
    }
  }
}

template <class T>
void multiply_by_dots(const Product<T>& p, const Sizes& s) {
  DotProduct<T> dots{s.blocks, p.M,    p.N,    s.K,    p.a,    s.a_rs,
                     p.b,      s.b_cs, p.c,    s.c_rs, s.c_cs, s.turned ? nullptr : p.bias,
                     s.add,    p.from, p.scale};
  multiply_dots(dots);
  if (!s.pair) return;
  dots.a = p.more_a, dots.b = p.more_b, dots.bias = nullptr, dots.add = true, dots.from = 0;
  multiply_dots(dots);
}

template <class T>
void without_depth(const Product<T>& p, const Sizes& s) {
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t n = 0; n < p.N; ++n) {
      T& c = p.c[m * s.c_rs + n * s.c_cs];
      const T value = p.bias ? p.bias[s.turned ? m : n] : T(0);
      c = s.add ? fma_one(p.scale, value, (&c)[p.from]) : value;
    }
}

template <class T>
void multiply_staged(Product<T> p, const Sizes& s, T* staged, const T* kept, T* packed) {
  const int64_t from = p.from;
  const T scale = p.scale;
  p.from = 0, p.scale = 1;
  multiply(p, s, staged, p.N, false, kept, packed);
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t n = 0; n < p.N; ++n) {
      T& c = p.c[m * s.c_rs + n * s.c_cs];
      c = s.add ? fma_one(scale, staged[m * p.N + n], (&c)[from]) : staged[m * p.N + n];
    }
}

template <class T>
void run_product(const Product<T>& p, const Sizes& s, const T* kept, T* scratch) {
  if (s.K == 0) return without_depth(p, s);
  T* packed = scratch + s.staged_elements();
  if (s.dots)
    multiply_by_dots(p, s);
  else if (s.stage)
    multiply_staged(p, s, scratch, kept, packed);
  else
    multiply(p, s, p.c, s.c_rs, s.add, kept, packed);
  if (p.bias && s.turned)
    for (int64_t m = 0; m < p.M; ++m)
      for (int64_t n = 0; n < p.N; ++n) p.c[m * s.c_rs + n * s.c_cs] += p.bias[m];
}

template <class T>
void take_part(Product<T>& p, const Sizes& s, int part, int parts) {
  const bool by_columns = p.N >= p.M;
  const Range r = by_columns ? share(p.N, part, parts, s.width) : share(p.M, part, parts);
  if (by_columns)
    p.b += r.begin * s.b_cs, p.c += r.begin * s.c_cs, p.N = r.end - r.begin;
  else
    p.a += r.begin * s.a_rs, p.c += r.begin * s.c_rs, p.M = r.end - r.begin;
  if (s.pair && by_columns) p.more_b += r.begin * s.b_cs;
  if (s.pair && !by_columns) p.more_a += r.begin * s.a_rs;
  if (p.bias && by_columns != s.turned) p.bias += r.begin;
}

// What C takes up: itself, or D, and how often it takes the product.
template <class T>
struct TakenUp {
  int64_t from = 0;
  T scale = 1;
  TakenUp(const Args& a, const Sizes& s) {
    if (!s.scaled) return;
    from = static_cast<const T*>(a.ptr[3]) - static_cast<const T*>(a.ptr[2]);
    scale = static_cast<T>(s.scaled) * *static_cast<const T*>(a.ptr[4]);
  }
};

// The share of a product whose batch lies in lanes: rows of every vector of it.
template <class T>
void run_lanes(const Args& a, const Sizes& s) {
  const Range rows = share(s.M, a.part, a.parts);
  const T *x = static_cast<const T*>(a.ptr[s.turned]), *y = static_cast<const T*>(a.ptr[!s.turned]);
  T* z = static_cast<T*>(a.ptr[2]);
  const TakenUp<T> up(a, s);
  const T *more_x = s.pair_operand<T>(a, s.turned), *more_y = s.pair_operand<T>(a, !s.turned);
  for (int64_t b = 0; b < s.batch; b += kLanes<T>) {
    const int64_t a_at = b * s.a_bs + rows.begin * s.a_rs, b_at = b * s.b_bs;
    const LaneMatrix<const T> A{x + a_at, s.a_rs, s.a_cs, s.a_bs == 1};
    const LaneMatrix<const T> B{y + b_at, s.b_rs, s.b_cs, s.b_bs == 1};
    const LaneMatrix<T> C{z + b + rows.begin * s.c_rs, s.c_rs, s.c_cs, true};
    multiply_lanes(LaneProduct<T>{rows.end - rows.begin, s.N, s.K, A, B, C, s.pair ? more_x + a_at : nullptr,
                                  s.pair ? more_y + b_at : nullptr, s.add, up.from, up.scale, s.columns,
                                  s.apart});
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
Keeping gemm_keeps(const int64_t* ints) noexcept {
  const Sizes s = Sizes::of<T>(ints);
  return {
      s.turned ? 0 : 1, s.kept_elements() * static_cast<int64_t>(sizeof(T)), {s.b_rs, s.b_cs, s.N, s.width}};
}

template <class T>
void gemm_keep(const Args& args) noexcept {
  const Sizes& s = *reinterpret_cast<const Sizes*>(args.prepared);
  const T* const b = static_cast<const T*>(args.ptr[!s.turned]);
  T* packed = reinterpret_cast<T*>(args.kept);
  for (int64_t k = 0; k < s.K; k += kDepth) {
    const int64_t depth = min64(kDepth, s.K - k);
    for (int64_t n = 0; n < s.N; n += s.width, packed += s.width * depth)
      pack_strip(b, s, k, depth, n, min64(s.width, s.N - n), packed);
  }
}

template <class T>
int gemm(const Args& args) noexcept {
  const Sizes& s = *reinterpret_cast<const Sizes*>(args.prepared);
  if (s.M == 0 || s.N == 0) return kOk;
  if (s.lanes && s.K > 0) return run_lanes<T>(args, s), kOk;
  const T *a = static_cast<const T*>(args.ptr[s.turned]), *b = static_cast<const T*>(args.ptr[!s.turned]);
  T* c = static_cast<T*>(args.ptr[2]);
  const T* bias = s.has_bias ? static_cast<const T*>(args.ptr[3]) : nullptr;
  const T *more_a = s.pair_operand<T>(args, s.turned), *more_b = s.pair_operand<T>(args, !s.turned);
  const TakenUp<T> up(args, s);
  const bool split_batch = s.batch >= args.parts;
  const Range batches = split_batch ? share(s.batch, args.part, args.parts) : Range{0, s.batch};
  for (int64_t n = batches.begin; n < batches.end; ++n) {
    Product<T> p{s.M,  s.N,     a + n * s.a_bs, b + n * s.b_bs, nullptr, nullptr, c + n * s.c_bs,
                 bias, up.from, up.scale};
    if (s.pair) p.more_a = more_a + n * s.a_bs, p.more_b = more_b + n * s.b_bs;
    if (!split_batch) take_part(p, s, args.part, args.parts);
    run_product(p, s, reinterpret_cast<const T*>(args.kept), reinterpret_cast<T*>(args.scratch));
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
template Keeping gemm_keeps<float>(const int64_t*) noexcept;
template Keeping gemm_keeps<double>(const int64_t*) noexcept;
template void gemm_keep<float>(const Args&) noexcept;
template void gemm_keep<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
