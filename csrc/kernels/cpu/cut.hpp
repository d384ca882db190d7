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

// The width of blocks, of at most `most` columns, that loads the fewest vectors for a product of M × N: a block loads
// its rows and its columns, and most_rows(width) is how many rows it may have.
template <class Rows>
int64_t best_columns(int64_t M, int64_t N, int64_t most, Rows most_rows) {
  const auto loads = [&](int64_t columns) {
    return Cut(N, columns).pieces * M + Cut(M, most_rows(columns)).pieces * N;
  };
  int64_t best = 1;
  for (int64_t c = 2; c <= most && c <= N; ++c)
    if (loads(c) < loads(best)) best = c;
  return best;
}

}  // namespace metafast::kernels::METAFAST_ISA
