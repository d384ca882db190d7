// How sizes are cut into the blocks that registers hold.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

// Terms that one accumulator adds up before C is touched: keeps chains of roundings short, and a strip of B in cache.
inline constexpr int64_t kDepth = 192;

// n cut into pieces of at most `most`: the first `more` are one longer than the others, which have `length`.
struct Cut {
  int64_t pieces, length, more;
  Cut(int64_t n, int64_t most) : pieces((n + most - 1) / most), length(0), more(0) {
    if (pieces) length = n / pieces, more = n - length * pieces;
  }
  int64_t begin(int64_t piece) const { return piece * length + min64(piece, more); }
};

// The longest piece where n is cut evenly into pieces of at most `most`.
inline int64_t piece(int64_t n, int64_t most) {
  const int64_t pieces = (n + most - 1) / most;
  return (n + pieces - 1) / pieces;
}

// The width of blocks, of at most `most` columns, that loads the fewest vectors for a product of M × N, and how many
// for a step along K: a block loads its rows and its columns, and most_rows(width) is how many rows it may have.
struct Width {
  int64_t columns, loads;
};
template <class Rows>
Width best_width(int64_t M, int64_t N, int64_t most, Rows most_rows) {
  Width best{0, 0};
  for (int64_t c = 1; c <= most && (c <= N || c == 1); ++c) {
    const int64_t loads = Cut(N, c).pieces * M + Cut(M, most_rows(c)).pieces * N;
    if (!best.columns || loads < best.loads) best = {c, loads};
  }
  return best;
}

}  // namespace metafast::kernels::METAFAST_ISA
