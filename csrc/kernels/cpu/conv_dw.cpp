// The weight gradient is a product over pixels, dw[(kh, kw, c)][o] = sum_p x[p moved by the tap][c] dy[p][o],
// taken block of pixels by block of pixels: the register tile sums over a block while x and dy lie in the
// first cache, and adds the block's sum to an accumulator in scratch. (The order of the sums depends on the
// shape alone.)
#include "ahead.hpp"
#include "conv.hpp"
#include "conv_window.hpp"
#include "tile.hpp"
#include "winograd.hpp"
#include "winograd_down.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

constexpr int64_t kBlockPixels = 112;

template <class T>
struct Plan {
  int64_t runs, run;       // runs of taps and channels that lie together in a row of x, and their length
  int64_t vectors, strip;  // of the output channels
  int64_t rows;            // output rows of a block
  Window window;           // of a whole block
  T *sums, *copy;          // sums: [runs][run][O]
  int64_t* segments;

  Plan(const ConvInts& i, Carver& scratch) {
    const bool together = i.dw == 1;
    runs = together ? i.KH : i.KH * i.KW;
    run = together ? i.KW * i.C : i.C;
    const int64_t total = (i.O + kLanes<T> - 1) / kLanes<T>;
    vectors = total == 1 ? 1 : (total == 3 ? 3 : 2);
    strip = vectors * kLanes<T>;
    rows = max64(1, min64(i.OH, kBlockPixels / max64(i.OW, 1)));
    window = {0, -i.pw, window_rows(i, rows), (i.OW - 1) * i.sw + (i.KW - 1) * i.dw + 1};
    sums = scratch.take<T>(runs * run * i.O);
    copy = scratch.take<T>(window.rows * window.columns * i.C);
    segments = scratch.take<int64_t>(rows);
  }

  static int64_t window_rows(const ConvInts& i, int64_t rows) {
    return (rows - 1) * i.sh + (i.KH - 1) * i.dh + 1;
  }

  // Where run r starts for output pixel (0, 0), in a source of this line length.
  int64_t run_offset(const ConvInts& i, int64_t r, int64_t line) const {
    return i.dw == 1 ? r * i.dh * line : r / i.KW * i.dh * line + r % i.KW * i.dw * i.C;
  }
};

// A tile's worth of dw: some rows of one run, one strip of output channels.
struct Item {
  int64_t strip, run, begin, rows;
};

template <class T>
struct Items {
  int64_t runs, strips, tiles, rows, run;
  Items(const ConvInts& i, const Plan<T>& p) : runs(p.runs), run(p.run) {
    strips = (i.O + p.strip - 1) / p.strip;
    const int64_t most = max_tile_rows(static_cast<int>(p.vectors));
    tiles = (p.run + most - 1) / most;
    rows = (p.run + tiles - 1) / max64(tiles, 1);
    tiles = (p.run + rows - 1) / max64(rows, 1);
  }
  int64_t count() const { return runs * strips * tiles; }
  Item at(int64_t k) const {
    const int64_t begin = k % tiles * rows;
    return {k / tiles / runs, k / tiles % runs, begin, min64(rows, run - begin)};
  }
};

// Adds one block of output rows to the sums of items [mine.begin, mine.end).
template <class T>
void add_block(const ConvInts& i, const Plan<T>& p, const Items<T>& items, Range mine, const T* x,
               int64_t line, const T* dy, int64_t rows) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r) p.segments[r] = r * i.sh * line;
  TileCall<T> call{};
  call.a_rs = 1, call.a_cs = i.sw * i.C;
  call.segment = p.segments, call.segments = rows, call.length = i.OW;
  call.b_rs = i.O, call.c_rs = i.O, call.add = true;
  const int64_t block = rows * i.OW * i.O;
  const bool large = i.N * i.OH * i.OW * i.O * static_cast<int64_t>(sizeof(T)) >= kLargeBytes;
  const Ahead next = Ahead::of(dy + block, dy + 2 * block);
  for (int64_t k = mine.begin; k < mine.end; ++k) {
    const Item item = items.at(k);
    if (large) next.fetch(k - mine.begin, mine.end - mine.begin);
    const int64_t n = item.strip * p.strip, columns = min64(p.strip, i.O - n),
                  vectors = (columns + L - 1) / L;
    call.last = columns - (vectors - 1) * L;
    call.a = x + p.run_offset(i, item.run, line) + item.begin;
    call.b = dy + n;
    call.c = p.sums + (item.run * p.run + item.begin) * i.O + n;
    find_tile<T>(item.rows, vectors)(call);
  }
}

template <class T>
void write_sums(const ConvInts& i, const Plan<T>& p, const Items<T>& items, Range mine, T* dw) {
  for (int64_t k = mine.begin; k < mine.end; ++k) {
    const Item item = items.at(k);
    const int64_t n = item.strip * p.strip, columns = min64(p.strip, i.O - n);
    for (int64_t r = item.begin; r < item.begin + item.rows; ++r) {
      const int64_t tap = i.dw == 1 ? item.run * i.KW + r / i.C : item.run;
      T* out = dw + tap / i.KW * i.w_skh + tap % i.KW * i.w_skw + r % i.C * i.w_sc + n * i.w_so;
      const T* sum = p.sums + (item.run * p.run + r) * i.O + n;
      if (i.mode)
        for (int64_t o = 0; o < columns; ++o) out[o * i.w_so] += sum[o];
      else
        for (int64_t o = 0; o < columns; ++o) out[o * i.w_so] = sum[o];
    }
  }
}

template <class T>
void clear_sums(const ConvInts& i, const Plan<T>& p, const Items<T>& items, Range mine) {
  for (int64_t k = mine.begin; k < mine.end; ++k) {
    const Item item = items.at(k);
    const int64_t n = item.strip * p.strip, columns = min64(p.strip, i.O - n);
    for (int64_t r = item.begin; r < item.begin + item.rows; ++r)
      zero_run(p.sums + (item.run * p.run + r) * i.O + n, columns);
  }
}

}  // namespace

template <class T>
int conv_dw(const Args& a) noexcept {
  const ConvInts& i = ConvInts::of(a.i);
  if (i.O * i.C * i.KH * i.KW == 0) return kOk;
  if constexpr (sizeof(T) == 4) {
    if (i.winograd && winograd_dw_suits(i)) return winograd_dw(i, a);
    if (i.winograd && winograd_down_dw_suits(i)) return winograd_down_dw(i, a);
  }
  Carver scratch(a.scratch);
  const Plan<T> p(i, scratch);
  const Items<T> items(i, p);
  each_piece(i, i.N, items.count(), 1, a, [&](int64_t piece, Range mine, Range images) {
    clear_sums(i, p, items, mine);
    for (int64_t image = images.begin; image < (i.OW > 0 ? images.end : 0); ++image)
      for (int64_t first = 0; first < i.OH; first += p.rows) {
        const int64_t rows = min64(p.rows, i.OH - first);
        Window w = p.window;
        w.top = first * i.sh - i.ph, w.rows = p.window_rows(i, rows);
        const T* picture = static_cast<const T*>(a.ptr[0]) + image * i.H * i.W * i.C;
        const T* dy = static_cast<const T*>(a.ptr[1]) + (image * i.OH + first) * i.OW * i.O;
        if (w.inside(i.H, i.W)) {
          add_block(i, p, items, mine, picture + (w.top * i.W + w.left) * i.C, i.W * i.C, dy, rows);
        } else {
          copy_window(p.copy, picture, i.H, i.W, i.C, w);
          add_block(i, p, items, mine, static_cast<const T*>(p.copy), w.columns * i.C, dy, rows);
        }
      }
    write_sums(i, p, items, mine, static_cast<T*>(a.ptr[2]) + piece * i.weights());
  });
  return kOk;
}

template <class T>
int64_t conv_dw_scratch(const int64_t* ints) noexcept {
  const ConvInts& i = ConvInts::of(ints);
  if constexpr (sizeof(T) == 4) {
    if (i.winograd && winograd_dw_suits(i)) return winograd_dw_scratch(i);
    if (i.winograd && winograd_down_dw_suits(i)) return winograd_down_dw_scratch(i);
  }
  Carver counter(nullptr);
  Plan<T>(i, counter);
  return counter.used();
}

template int conv_dw<float>(const Args&) noexcept;
template int conv_dw<double>(const Args&) noexcept;
template int64_t conv_dw_scratch<float>(const int64_t*) noexcept;
template int64_t conv_dw_scratch<double>(const int64_t*) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
