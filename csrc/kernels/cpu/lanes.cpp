#include "lanes.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

// Bytes of A that stay in a first-level cache while strips of B pass by.
constexpr int64_t kResident = 16384;

// A first-level cache of the smaller kind.
constexpr int64_t kFirstLevel = 32768;

// Accumulators, a row of B and one element of A fill the registers.
constexpr int max_rows(int columns) { return (kVecRegisters - 1 - columns) / columns; }
constexpr int kMostRows = 20;
constexpr int kMostColumns = 4;

template <class T>
using LaneTile = void (*)(const LaneProduct<T>&, int64_t m, int64_t n, int64_t k, int64_t depth) noexcept;

template <class T, bool lanes>
METAFAST_INLINE Vec<T> element(const T* p) {
  if constexpr (lanes)
    return load(p);
  else
    return splat(*p);
}

template <class T, int rows, int columns, bool a_lanes, bool b_lanes>
void tile(const LaneProduct<T>& p, int64_t m, int64_t n, int64_t k, int64_t depth) noexcept {
  Vec<T> acc[rows][columns];
  METAFAST_UNROLL for (int r = 0; r < rows; ++r) METAFAST_UNROLL for (int c = 0; c < columns; ++c) acc[r][c] =
      Vec<T>{};
  const int64_t rs = p.A.rs, cs = p.B.cs, a_at = m * rs + k * p.A.cs, b_at = k * p.B.rs + n * cs;
  const T *first = p.A.p + a_at, *b = p.B.p + b_at;
  for (bool last = p.more_a == nullptr;; last = true) {
    // One pointer for every three rows: the processor adds rs and 2 rs for free.
    constexpr int bases = (rows + 2) / 3;
    const T* a[bases];
    METAFAST_UNROLL for (int g = 0; g < bases; ++g) a[g] = first + 3 * g * rs;
    for (int64_t j = depth; j > 0; --j) {
      Vec<T> row[columns];
      METAFAST_UNROLL for (int c = 0; c < columns; ++c) row[c] = element<T, b_lanes>(b + c * cs);
      METAFAST_UNROLL for (int r = 0; r < rows; ++r) {
        const Vec<T> x = element<T, a_lanes>(a[r / 3] + r % 3 * rs);
        METAFAST_UNROLL for (int c = 0; c < columns; ++c) acc[r][c] = fma<T>(x, row[c], acc[r][c]);
      }
      METAFAST_UNROLL for (int g = 0; g < bases; ++g) {
        a[g] += p.A.cs;
        asm("" : "+r"(a[g]));  // else the compiler keeps a pointer for every row, on the stack
      }
      b += p.B.rs;
    }
    if (last) break;
    first = p.more_a + a_at, b = p.more_b + b_at;
  }
  // Read before the first store: after each the compiler would read them anew.
  const int64_t c_rs = p.C.rs, c_cs = p.C.cs, from = k > 0 ? 0 : p.from;
  T* const out = p.C.p + m * c_rs + n * c_cs;
  if (p.add || k > 0) {
    const T* const taken = out + from;
    const Vec<T> scale = splat(p.scale);
    METAFAST_UNROLL for (int r = 0; r < rows; ++r) METAFAST_UNROLL for (int c = 0; c < columns; ++c)
        acc[r][c] = fma<T>(acc[r][c], scale, load(taken + r * c_rs + c * c_cs));
  }
  METAFAST_UNROLL for (int r = 0; r < rows; ++r) METAFAST_UNROLL for (int c = 0; c < columns; ++c)
      store(out + r * c_rs + c * c_cs, acc[r][c]);
}

template <class T, int rows, int columns>
LaneTile<T> with_operands(bool a_lanes, bool b_lanes) {
  if constexpr (rows <= max_rows(columns)) {
    if (!a_lanes) return tile<T, rows, columns, false, true>;
    return b_lanes ? tile<T, rows, columns, true, true> : tile<T, rows, columns, true, false>;
  } else {
    return nullptr;
  }
}

template <class T, int columns>
LaneTile<T> with_rows(int64_t rows, bool a, bool b) {
  switch (rows) {
#define METAFAST_CASE(r) \
  case r:                \
    return with_operands<T, r, columns>(a, b);
    METAFAST_CASE(1)
    METAFAST_CASE(2)
    METAFAST_CASE(3)
    METAFAST_CASE(4)
    METAFAST_CASE(5)
    METAFAST_CASE(6)
    METAFAST_CASE(7)
    METAFAST_CASE(8)
    METAFAST_CASE(9)
    METAFAST_CASE(10)
    METAFAST_CASE(11)
    METAFAST_CASE(12)
    METAFAST_CASE(13)
    METAFAST_CASE(14)
    METAFAST_CASE(15)
    METAFAST_CASE(16)
    METAFAST_CASE(17)
    METAFAST_CASE(18)
    METAFAST_CASE(19)
    default:
      return with_operands<T, kMostRows, columns>(a, b);
#undef METAFAST_CASE
  }
}

template <class T>
LaneTile<T> find(int64_t rows, int64_t columns, bool a, bool b) {
  switch (columns) {
    case 1:
      return with_rows<T, 1>(rows, a, b);
    case 2:
      return with_rows<T, 2>(rows, a, b);
    case 3:
      return with_rows<T, 3>(rows, a, b);
    default:
      return with_rows<T, kMostColumns>(rows, a, b);
  }
}

int64_t most_rows(int64_t columns) {
  const int64_t rows = max_rows(static_cast<int>(columns));
  return rows < kMostRows ? rows : kMostRows;
}

// Blocks of one width, `first` to `end` of those that the rows are cut into.
template <class T>
void run_strip(const LaneProduct<T>& p, const Cut& rows, int64_t first, int64_t end, int64_t n, int64_t width,
               int64_t k, int64_t depth) noexcept {
  const LaneTile<T> longer = find<T>(rows.length + 1, width, p.A.lanes, p.B.lanes);
  const LaneTile<T> other = find<T>(rows.length, width, p.A.lanes, p.B.lanes);
  for (int64_t r = first; r < end; ++r) (r < rows.more ? longer : other)(p, rows.begin(r), n, k, depth);
}

template <class T>
void multiply_in_blocks(const LaneProduct<T>& p) noexcept {
  constexpr int64_t bytes = kLanes<T> * static_cast<int64_t>(sizeof(T));
  const Cut rows(p.M, most_rows(p.columns)), strips(p.N, p.columns);
  for (int64_t k = 0; k < p.K; k += kDepth) {
    const int64_t depth = min64(kDepth, p.K - k);
    const int64_t together = max64(1, kResident / (bytes * depth * most_rows(p.columns)));
    for (int64_t first = 0; first < rows.pieces; first += together)
      for (int64_t s = 0; s < strips.pieces; ++s) {
        const int64_t n = strips.begin(s), end = min64(first + together, rows.pieces);
        run_strip(p, rows, first, end, n, strips.begin(s + 1) - n, k, depth);
      }
  }
}

}  // namespace

template <class T>
Width lane_width(int64_t M, int64_t N) noexcept {
  return best_width(M, N, kMostColumns, most_rows);
}

bool lanes_apart(int64_t M, int64_t N, int64_t K) noexcept {
  return N <= K && 2 * M * K * kVecBytes > kFirstLevel;
}

template <class T>
void multiply_lanes(const LaneProduct<T>& p) noexcept {
  if (!p.more_a || !p.apart) return multiply_in_blocks(p);
  LaneProduct<T> each = p;
  each.more_a = each.more_b = nullptr;
  multiply_in_blocks(each);
  each.A.p = p.more_a, each.B.p = p.more_b;
  each.scale = p.add ? p.scale : T(1), each.add = true, each.from = 0;
  multiply_in_blocks(each);
}

template Width lane_width<float>(int64_t, int64_t) noexcept;
template Width lane_width<double>(int64_t, int64_t) noexcept;
template void multiply_lanes<float>(const LaneProduct<float>&) noexcept;
template void multiply_lanes<double>(const LaneProduct<double>&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
