#include "tile.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

// Masked loads are free with AVX-512; elsewhere the tile with a full last vector has its own code.
template <class T, int rows, int vectors, bool masked>
void tile(const TileCall<T>& t) noexcept {
  constexpr int L = kLanes<T>;
  const Mask<T> mask(t.last);
  Vec<T> acc[rows][vectors];
  METAFAST_UNROLL for (int r = 0; r < rows; ++r) METAFAST_UNROLL for (int v = 0; v < vectors; ++v) acc[r][v] =
      Vec<T>{};
  const T* b = t.b;
  const int64_t rs = t.a_rs, cs = t.a_cs;
  for (int64_t s = 0; s < t.segments; ++s) {
    // One pointer for every three rows: the processor adds rs and 2 rs for free.
    constexpr int bases = (rows + 2) / 3;
    const T* a[bases];
    METAFAST_UNROLL for (int g = 0; g < bases; ++g) a[g] = t.a + t.segment[s] + 3 * g * rs;
    for (int64_t j = t.length; j > 0; --j) {
      Vec<T> row[vectors];
      METAFAST_UNROLL for (int v = 0; v < vectors; ++v) row[v] =
          masked && v == vectors - 1 ? load(b + v * L, mask) : load(b + v * L);
      METAFAST_UNROLL for (int r = 0; r < rows; ++r) {
        const Vec<T> x = splat(a[r / 3][r % 3 * rs]);
        METAFAST_UNROLL for (int v = 0; v < vectors; ++v) acc[r][v] = fma<T>(x, row[v], acc[r][v]);
      }
      METAFAST_UNROLL for (int g = 0; g < bases; ++g) {
        a[g] += cs;
        asm("" : "+r"(a[g]));  // else the compiler keeps a pointer for every row, on the stack
      }
      b += t.b_rs;
    }
    b += t.b_gap;
  }
  if (t.bias) METAFAST_UNROLL for (int v = 0; v < vectors; ++v) {
      const Vec<T> x = v == vectors - 1 ? load(t.bias + v * L, mask) : load(t.bias + v * L);
      METAFAST_UNROLL for (int r = 0; r < rows; ++r) acc[r][v] += x;
    }
  T* const out = t.c;  // else the compiler reads these anew after every store
  const int64_t c_rs = t.c_rs;
  if (t.add) {
    const T* const e = out + t.from;
    const Vec<T> scale = splat(t.scale);
    METAFAST_UNROLL for (int r = 0; r < rows; ++r) METAFAST_UNROLL for (int v = 0; v < vectors; ++v) {
      const T* x = e + r * c_rs + v * L;
      acc[r][v] = fma<T>(acc[r][v], scale, masked && v == vectors - 1 ? load(x, mask) : load(x));
    }
  }
  METAFAST_UNROLL for (int r = 0; r < rows; ++r) METAFAST_UNROLL for (int v = 0; v < vectors; ++v) {
    T* c = out + r * c_rs + v * L;
    if (v < vectors - 1 || !masked)
      store(c, acc[r][v]);
    else
      store(c, acc[r][v], mask);
  }
}

#if defined(__AVX512F__)
METAFAST_INLINE Vec<float> both_halves(const float* p, __mmask8 m) {
  return _mm512_broadcast_f32x8(_mm256_maskz_loadu_ps(m, p));
}
METAFAST_INLINE Vec<double> both_halves(const double* p, __mmask8 m) {
  return _mm512_broadcast_f64x4(_mm256_maskz_loadu_pd(m, p));
}
// The lower half of a beside the upper half of b.
METAFAST_INLINE Vec<float> halves(Vec<float> a, Vec<float> b) { return _mm512_mask_mov_ps(a, 0xff00, b); }
METAFAST_INLINE Vec<double> halves(Vec<double> a, Vec<double> b) { return _mm512_mask_mov_pd(a, 0xf0, b); }
METAFAST_INLINE void store_half(float* p, __mmask8 m, Vec<float> v, bool upper) {
  _mm256_mask_storeu_ps(p, m, upper ? _mm512_extractf32x8_ps(v, 1) : _mm512_castps512_ps256(v));
}
METAFAST_INLINE void store_half(double* p, __mmask8 m, Vec<double> v, bool upper) {
  _mm256_mask_storeu_pd(p, m, upper ? _mm512_extractf64x4_pd(v, 1) : _mm512_castpd512_pd256(v));
}

// Where no more than half of the last vector is used: two rows share an accumulator there, each in one half of it.
template <class T, int rows, int vectors>
void halved_tile(const TileCall<T>& t) noexcept {
  constexpr int L = kLanes<T>, whole = vectors - 1, pairs = (rows + 1) / 2;
  const auto mask = static_cast<__mmask8>((1u << t.last) - 1);
  Vec<T> acc[rows][whole], tail[pairs];
  METAFAST_UNROLL for (int r = 0; r < rows; ++r) METAFAST_UNROLL for (int v = 0; v < whole; ++v) acc[r][v] =
      Vec<T>{};
  METAFAST_UNROLL for (int q = 0; q < pairs; ++q) tail[q] = Vec<T>{};
  const T* b = t.b;
  const int64_t rs = t.a_rs, cs = t.a_cs;
  for (int64_t s = 0; s < t.segments; ++s) {
    constexpr int bases = (rows + 2) / 3;  // as in `tile`
    const T* a[bases];
    METAFAST_UNROLL for (int g = 0; g < bases; ++g) a[g] = t.a + t.segment[s] + 3 * g * rs;
    for (int64_t j = t.length; j > 0; --j) {
      Vec<T> row[whole];
      METAFAST_UNROLL for (int v = 0; v < whole; ++v) row[v] = load(b + v * L);
      const Vec<T> rest = both_halves(b + whole * L, mask);
      METAFAST_UNROLL for (int r = 0; r < rows; r += 2) {
        Vec<T> x = splat(a[r / 3][r % 3 * rs]);
        METAFAST_UNROLL for (int v = 0; v < whole; ++v) acc[r][v] = fma<T>(x, row[v], acc[r][v]);
        if (r + 1 < rows) {
          const Vec<T> y = splat(a[(r + 1) / 3][(r + 1) % 3 * rs]);
          METAFAST_UNROLL for (int v = 0; v < whole; ++v) acc[r + 1][v] = fma<T>(y, row[v], acc[r + 1][v]);
          x = halves(x, y);
        }
        tail[r / 2] = fma<T>(x, rest, tail[r / 2]);
      }
      METAFAST_UNROLL for (int g = 0; g < bases; ++g) {
        a[g] += cs;
        asm("" : "+r"(a[g]));
      }
      b += t.b_rs;
    }
    b += t.b_gap;
  }
  if (t.bias) {
    METAFAST_UNROLL for (int v = 0; v < whole; ++v) {
      const Vec<T> x = load(t.bias + v * L);
      METAFAST_UNROLL for (int r = 0; r < rows; ++r) acc[r][v] += x;
    }
    const Vec<T> x = both_halves(t.bias + whole * L, mask);
    METAFAST_UNROLL for (int q = 0; q < pairs; ++q) tail[q] += x;
  }
  T* const out = t.c;
  const int64_t c_rs = t.c_rs;
  if (t.add) {
    const T* const e = out + t.from;
    const Vec<T> scale = splat(t.scale);
    METAFAST_UNROLL for (int r = 0; r < rows; ++r) METAFAST_UNROLL for (int v = 0; v < whole; ++v) acc[r][v] =
        fma<T>(acc[r][v], scale, load(e + r * c_rs + v * L));
    METAFAST_UNROLL for (int q = 0; q < pairs; ++q) {
      const T* const x = e + 2 * q * c_rs + whole * L;
      Vec<T> taken = both_halves(x, mask);
      if (2 * q + 1 < rows) taken = halves(taken, both_halves(x + c_rs, mask));
      tail[q] = fma<T>(tail[q], scale, taken);
    }
  }
  METAFAST_UNROLL for (int r = 0; r < rows; ++r) {
    METAFAST_UNROLL for (int v = 0; v < whole; ++v) store(out + r * c_rs + v * L, acc[r][v]);
    store_half(out + r * c_rs + whole * L, mask, tail[r / 2], r % 2 == 1);
  }
}
#endif

template <class T, int rows, int vectors>
void tile_of_any_width(const TileCall<T>& t) noexcept {
#if defined(__AVX512F__)
  tile<T, rows, vectors, true>(t);
#else
  if (t.last == kLanes<T>)
    tile<T, rows, vectors, false>(t);
  else
    tile<T, rows, vectors, true>(t);
#endif
}

template <class T, int rows, int vectors, bool halved>
constexpr Tile<T> entry() {
  constexpr bool there = !halved || halves_tile<T>(vectors, 1);
  if constexpr (!there || rows > max_tile_rows(vectors, halved)) return nullptr;
#if defined(__AVX512F__)
  else if constexpr (halved)
    return halved_tile<T, rows, vectors>;
#endif
  else
    return tile_of_any_width<T, rows, vectors>;
}

template <class T, bool h>
struct Tiles {
#define METAFAST_ROWS(v)                                                                   \
  {entry<T, 1, v, h>(),  entry<T, 2, v, h>(),  entry<T, 3, v, h>(),  entry<T, 4, v, h>(),  \
   entry<T, 5, v, h>(),  entry<T, 6, v, h>(),  entry<T, 7, v, h>(),  entry<T, 8, v, h>(),  \
   entry<T, 9, v, h>(),  entry<T, 10, v, h>(), entry<T, 11, v, h>(), entry<T, 12, v, h>(), \
   entry<T, 13, v, h>(), entry<T, 14, v, h>()}
  static constexpr Tile<T> of[kMaxTileVectors][14] = {METAFAST_ROWS(1), METAFAST_ROWS(2), METAFAST_ROWS(3),
                                                      METAFAST_ROWS(4)};
#undef METAFAST_ROWS
};

}  // namespace

template <class T>
Tile<T> find_tile(int64_t rows, int64_t vectors, bool halved) noexcept {
  return (halved ? Tiles<T, true>::of : Tiles<T, false>::of)[vectors - 1][rows - 1];
}

template Tile<float> find_tile<float>(int64_t, int64_t, bool) noexcept;
template Tile<double> find_tile<double>(int64_t, int64_t, bool) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
