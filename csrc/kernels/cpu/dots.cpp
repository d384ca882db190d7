#include "dots.hpp"

#include "cut.hpp"
#include "sums.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

constexpr int kMostColumns = 5;
constexpr int kMostRows = 8;
// Accumulators, a vector of every column and one of a row fill 16 registers.
constexpr int max_rows(int columns) {
  constexpr int rows[] = {8, 6, 4, 2, 2};
  return rows[columns - 1];
}
// Steps along k from which on larger blocks are worth more than lanes that are joined as one square.
constexpr int64_t kManySteps = 24;

// Of the product, elements (m, n).. and terms k..k + depth.
struct Block {
  int64_t m, n, k, depth;
};

template <class T, int rows, int columns>
METAFAST_INLINE void dot_block(const DotProduct<T>& p, const Block& at) {
  constexpr int L = kLanes<T>, elements = rows * columns, groups = (elements + L - 1) / L;
  const T* a = p.a + at.m * p.a_rs + at.k;
  const T* b = p.b + at.n * p.b_cs + at.k;
  Vec<T> acc[groups * L];
  METAFAST_UNROLL for (int e = 0; e < groups * L; ++e) acc[e] = Vec<T>{};
  auto step = [&](auto get) {
    Vec<T> y[columns];
    METAFAST_UNROLL for (int c = 0; c < columns; ++c) y[c] = get(b + c * p.b_cs);
    METAFAST_UNROLL for (int r = 0; r < rows; ++r) {
      const Vec<T> x = get(a + r * p.a_rs);
      METAFAST_UNROLL for (int c = 0; c < columns; ++c) acc[r * columns + c] =
          fma<T>(x, y[c], acc[r * columns + c]);
    }
  };
  int64_t k = 0;
  for (; k + L <= at.depth; k += L) step([&](const T* x) { return load(x + k); });
  if (k < at.depth) {
    const Mask<T> rest(at.depth - k);
    step([&](const T* x) { return load(x + k, rest); });
  }
  T sums[groups * L];
  METAFAST_UNROLL for (int g = 0; g < groups; ++g) store(sums + g * L, join_lanes<T, Add<T>>(acc + g * L));
  const bool last = at.k + at.depth == p.K, add = p.add || at.k > 0;
  const int64_t from = at.k > 0 ? 0 : p.from;
  if (last && p.bias)
    METAFAST_UNROLL for (int e = 0; e < elements; ++e) sums[e] += p.bias[at.n + e % columns];
  T* out = p.c + at.m * p.c_rs + at.n * p.c_cs;
  METAFAST_UNROLL for (int r = 0; r < rows; ++r, out += p.c_rs)
      METAFAST_UNROLL for (int c = 0; c < columns; ++c) {
    T* const y = out + c * p.c_cs;
    *y = add ? fma_one(p.scale, sums[r * columns + c], y[from]) : sums[r * columns + c];
  }
}

// Blocks from row m on, as many as have all their rows; where the next would begin.
template <class T, int rows, int columns>
int64_t dot_blocks(const DotProduct<T>& p, Block at) noexcept {
  for (; at.m + rows <= p.M; at.m += rows) dot_block<T, rows, columns>(p, at);
  return at.m;
}

template <class T>
using Dots = int64_t (*)(const DotProduct<T>&, Block) noexcept;

template <class T, int rows, int columns>
constexpr Dots<T> entry() {
  if constexpr (rows <= max_rows(columns))
    return dot_blocks<T, rows, columns>;
  else
    return nullptr;
}

template <class T>
constexpr Dots<T> kBlocks[kMostColumns][kMostRows] = {
#define METAFAST_ROWS(c)                                                   \
  {entry<T, 1, c>(), entry<T, 2, c>(), entry<T, 3, c>(), entry<T, 4, c>(), \
   entry<T, 5, c>(), entry<T, 6, c>(), entry<T, 7, c>(), entry<T, 8, c>()}
    METAFAST_ROWS(1), METAFAST_ROWS(2), METAFAST_ROWS(3), METAFAST_ROWS(4), METAFAST_ROWS(5)
#undef METAFAST_ROWS
};

int64_t most_rows(int64_t columns) { return max_rows(static_cast<int>(columns)); }

}  // namespace

// Pieces of one size but for the last.
template <class T>
DotShape dot_shape(int64_t M, int64_t N, int64_t K) noexcept {
  constexpr int64_t L = kLanes<T>;
  if (M == 0 || N == 0) return {1, 1};
  const bool large = M > 1 && K >= kManySteps * L;
  const int64_t columns =
      large ? best_width(M, N, kMostColumns, most_rows).columns : piece(N, min64(L, kMostColumns));
  return {piece(M, large ? most_rows(columns) : min64(L / columns, most_rows(columns))), columns};
}

template <class T>
void multiply_dots(const DotProduct<T>& p) noexcept {
  constexpr int64_t terms = kDepth * kLanes<T>;
  for (int64_t k = 0; k < p.K; k += terms)
    for (int64_t n = 0; n < p.N; n += p.shape.columns) {
      const Dots<T>* const blocks = kBlocks<T>[min64(p.shape.columns, p.N - n) - 1];
      for (int64_t m = 0; m < p.M;)
        m = blocks[min64(p.shape.rows, p.M - m) - 1](p, {m, n, k, min64(terms, p.K - k)});
    }
}

template DotShape dot_shape<float>(int64_t, int64_t, int64_t) noexcept;
template DotShape dot_shape<double>(int64_t, int64_t, int64_t) noexcept;
template void multiply_dots<float>(const DotProduct<float>&) noexcept;
template void multiply_dots<double>(const DotProduct<double>&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
