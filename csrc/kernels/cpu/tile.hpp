// The register tile under gemm and the convolutions: `rows` × `vectors` accumulators that stay in registers
// over the whole inner dimension.
//
// C(m, n) = sum over segments s and steps j of A(m, s, j) * B(s * length + j, n) (+ bias[n])
//   A(m, s, j) = a[m * a_rs + segment[s] + j * a_cs]   any strides; read one element at a time (broadcast)
//   B(k, n)    = b[k * b_rs + n]                       n lies together; b_gap elements more before each next segment
//   C(m, n)    = c[m * c_rs + n]
// or C = E + scale * that, where E lies as C does and may be C.
// Columns beyond `last` in the last vector are neither read nor written. Each element is one chain of fma
// over k in order, whatever the tile.
#pragma once
#include "ahead.hpp"

namespace metafast::kernels::METAFAST_ISA {

template <class T>
struct TileCall {
  const T* a;
  int64_t a_rs, a_cs;
  const int64_t* segment;  // offsets into a
  int64_t segments, length;
  const T* b;
  int64_t b_rs, b_gap;
  T* c;
  int64_t c_rs;
  const T* bias;  // or null
  bool add;       // takes up E, which lies `from` elements behind C
  int64_t last;   // columns of the last vector, 1..kLanes
  int64_t from = 0;
  T scale = 1;
};

template <class T>
using Tile = void (*)(const TileCall<T>&) noexcept;

inline constexpr int kMaxTileVectors = 4;

// Most rows of a tile of `vectors` columns: accumulators, one row of B and one broadcast fill the registers. Halved,
// the last vector's accumulators serve two rows each, whose two broadcasts are put together; of one vector, and where
// putting together is not one instruction, that gains nothing.
constexpr int max_tile_rows(int vectors, bool halved = false) {
  const int whole = halved ? vectors - 1 : vectors;
  int rows = 14;
  while (rows > 0 && rows * whole + (halved ? (rows + 1) / 2 + 2 : 0) + whole + 1 > kVecRegisters) --rows;
  return rows;
}
template <class T>
constexpr bool halves_tile(int64_t vectors, int64_t last) {
  return kVecBytes == 64 && vectors > 1 && 2 * last <= kLanes<T>;
}

// Rows of the next tile where m remain: full tiles and then two even ones rather than a full one and a thin
// one.
constexpr int64_t next_tile_rows(int64_t m, int64_t most) {
  return m <= most ? m : (m < 2 * most ? (m + 1) / 2 : most);
}

// The tile of rows × vectors, 1 <= vectors <= kMaxTileVectors, 1 <= rows <= max_tile_rows(vectors, halved); halved only
// where halves_tile.
template <class T>
Tile<T> find_tile(int64_t rows, int64_t vectors, bool halved = false) noexcept;

extern template Tile<float> find_tile<float>(int64_t, int64_t, bool) noexcept;
extern template Tile<double> find_tile<double>(int64_t, int64_t, bool) noexcept;

// Runs tiles down the M rows of one strip of `vectors` vectors; where C is large, it is fetched `ahead` rows before.
template <class T>
METAFAST_INLINE void run_strip(TileCall<T> call, int64_t m_rows, int64_t vectors, int64_t ahead = 0) {
  const bool halved = halves_tile<T>(vectors, call.last);
  const int64_t most = max_tile_rows(static_cast<int>(vectors), halved);
  Tile<T> tile = nullptr;
  for (int64_t rows = 0; m_rows > 0;) {
    const int64_t next = next_tile_rows(m_rows, most);
    if (next != rows) rows = next, tile = find_tile<T>(rows, vectors, halved);
    for (int64_t r = ahead; ahead && r < ahead + rows; ++r)
      Ahead::of(call.c + r * call.c_rs, call.c + r * call.c_rs + vectors * kLanes<T>).fetch(0, 1);
    tile(call);
    call.a += rows * call.a_rs, call.c += rows * call.c_rs, m_rows -= rows;
  }
}

}  // namespace metafast::kernels::METAFAST_ISA
