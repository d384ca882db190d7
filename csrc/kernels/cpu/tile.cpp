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

template <class T, int rows, int vectors>
constexpr Tile<T> entry() {
  if constexpr (rows <= max_tile_rows(vectors))
    return tile_of_any_width<T, rows, vectors>;
  else
    return nullptr;
}

template <class T>
struct Tiles {
#define METAFAST_ROWS(v)                                                                         \
  {entry<T, 1, v>(),  entry<T, 2, v>(),  entry<T, 3, v>(),  entry<T, 4, v>(), entry<T, 5, v>(),  \
   entry<T, 6, v>(),  entry<T, 7, v>(),  entry<T, 8, v>(),  entry<T, 9, v>(), entry<T, 10, v>(), \
   entry<T, 11, v>(), entry<T, 12, v>(), entry<T, 13, v>(), entry<T, 14, v>()}
  static constexpr Tile<T> of[kMaxTileVectors][14] = {METAFAST_ROWS(1), METAFAST_ROWS(2), METAFAST_ROWS(3),
                                                      METAFAST_ROWS(4)};
#undef METAFAST_ROWS
};

}  // namespace

template <class T>
Tile<T> find_tile(int64_t rows, int64_t vectors) noexcept {
  return Tiles<T>::of[vectors - 1][rows - 1];
}

template Tile<float> find_tile<float>(int64_t, int64_t) noexcept;
template Tile<double> find_tile<double>(int64_t, int64_t) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
