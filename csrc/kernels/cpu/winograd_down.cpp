#include "winograd_down.hpp"

#include <type_traits>

#include "ahead.hpp"
#include "cut.hpp"
#include "winograd_axis.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

constexpr int L = kLanes<float>;
constexpr int kRows = 4;                              // of a tile
constexpr int kAtOnce = kVecRegisters >= 32 ? 6 : 3;  // points whose products are in registers together
constexpr int kPlace[kAxis] = {3, 0, 1, 2, 4, 5};     // of ∞, 0, a, −a, b, −b here: ±a with 0, ±b with ∞
constexpr int kStripVectors = 2;
constexpr int64_t kStrip = kStripVectors * L;
constexpr int64_t kStretch = 128;  // columns of which four rows of one vector stay in the first-level cache

METAFAST_INLINE void keep_in_register(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));  // else the compiler reads it from memory for every product
#endif
}

int64_t tiles_of(int64_t outputs) { return (outputs + kRows - 1) / kRows; }

// Where images come from: dense, channels last; output (0, 0) reads from row `top` and column `left` onwards.
struct Source {
  const float* p;
  int64_t height, width, channels, top, left;
};

// The points of three taps' worth of columns: for every point a line of them, `pixel` elements from column to column, each
// with `groups` times three elements that lie together, which the taps across and the channels make up.
struct PointLines {
  float* p;       // of column 0
  float* inside;  // of the first column that lies in the image
  int64_t step, line;
  int64_t pixel, groups;
  int64_t from, columns;  // those of the image, in elements
  float* zeros;           // a row above or below the image

  PointLines(const Source& s, int64_t outputs, Carver& scratch)
      : line((outputs + 2) * s.channels), pixel(s.channels), groups(s.channels) {
    const int64_t before = max64(0, min64(outputs + 2, -s.left));
    const int64_t present = max64(0, min64(s.width - max64(0, s.left), outputs + 2 - before));
    from = max64(0, s.left) * pixel, columns = present * pixel;
    const int64_t lead = round_up(before * pixel, L) - before * pixel;  // so that what is written is aligned
    step = round_up(lead + line, L) + L;
    p = scratch.take<float>(kAxis * step) + lead;
    inside = p + before * pixel;
    zeros = scratch.take<float>(columns);
  }

  // Before the first use: what lies outside of the image has zeros at all points.
  void clear() const {
    for (int k = 0; k < kAxis; ++k) zero_run(p + k * step, line);
    zero_run(zeros, columns);
  }

  // Bᵀ d of tile `tile` of an image.
  void fill(const Source& s, const float* image, int64_t tile) const {
    const float* row[kAxis];
    for (int k = 0; k < kAxis; ++k) {
      const int64_t r = kRows * tile + s.top + k;
      row[k] = r < 0 || r >= s.height ? zeros : image + r * s.width * s.channels + from;
    }
    each_vector<float>({0, columns}, [&](int64_t k, auto lanes) {
      V d[kAxis], v[kAxis];
      METAFAST_UNROLL for (int i = 0; i < kAxis; ++i) d[i] = load(row[i] + k, lanes);
      to_points(d, v);
      METAFAST_UNROLL for (int i = 0; i < kAxis; ++i) store(inside + kPlace[i] * step + k, v[i], lanes);
    });
  }
};

// ---- forward, and the gradient in x ----------------------------------------------------------------------------

// Filters at the points: [strips of columns][6 / kAtOnce][taps and channels][kAtOnce][kStrip].
struct Filters {
  float* p;
  int64_t run;  // taps × channels

  Filters(const Correlation<float>& c, Carver& scratch) : run(3 * c.channels) {
    p = scratch.take<float>(round_up(c.columns, kStrip) * kAxis * run);
  }
  float* at(int64_t n, int64_t k, int place) const {
    return p + n * kAxis * run + ((place / kAtOnce * run + k) * kAtOnce + place % kAtOnce) * kStrip;
  }
  void fill(const Correlation<float>& c, const PackedWeights<float>& weights) const {
    weights.fill(c, 3, 3);
    for (int64_t n = 0; n < c.columns; n += kStrip)
      for (int64_t k = 0; k < run; ++k) METAFAST_UNROLL for (int v = 0; v < kStripVectors; ++v) {
          const float* w = weights.packed + n * weights.depth + k * kStrip + v * L;
          const V g[3] = {load(w), load(w + run * kStrip), load(w + 2 * run * kStrip)};
          V t[kAxis];
          filter_to_points(g, t);
          METAFAST_UNROLL for (int i = 0; i < kAxis; ++i) store(at(n, k, kPlace[i]) + v * L, t[i]);
        }
  }
};

struct CorrelationPlan {
  Source source;
  PointLines points;
  Filters filters;
  PackedWeights<float> weights;
  float* bias;

  CorrelationPlan(const Correlation<float>& c, Carver& scratch)
      : source{c.source, c.height, c.width, c.channels, c.v.low, c.h.low},
        points(source, c.h.outputs, scratch),
        filters(c, scratch),
        weights(c, kStrip, 9, scratch),
        bias(scratch.take<float>(round_up(c.columns, kStrip))) {}
};

struct Tile {
  const float *x, *filters, *bias;
  int64_t step, pixel, run;  // of the points
  float* out;
  int64_t out_row, out_pixel, rows;
  bool add;
  Ahead next;  // what the next tile of rows writes
};

// Adds to acc the products at points beginning with that of `x`.
template <int columns, int vectors>
METAFAST_INLINE const float* add_products(const Tile& t, const float* x, const float* filter,
                                          V (&acc)[kAtOnce][columns][vectors]) {
  const float* at[kAtOnce / 3];
  METAFAST_UNROLL for (int h = 0; h < kAtOnce / 3; ++h) at[h] = x + 3 * h * t.step;
  for (int64_t k = t.run; k > 0; --k) {
    METAFAST_UNROLL for (int p = 0; p < kAtOnce; ++p) {
      V w[vectors];
      METAFAST_UNROLL for (int v = 0; v < vectors; ++v) {
        w[v] = load(filter + p * kStrip + v * L);
        keep_in_register(w[v]);
      }
      METAFAST_UNROLL for (int c = 0; c < columns; ++c) {
        V value = splat(at[p / 3][p % 3 * t.step + c * t.pixel]);
        keep_in_register(value);
        METAFAST_UNROLL for (int v = 0; v < vectors; ++v) acc[p][c][v] =
            fma<float>(value, w[v], acc[p][c][v]);
      }
    }
    filter += kAtOnce * kStrip;
    asm("" : "+r"(filter));
    METAFAST_UNROLL for (int h = 0; h < kAtOnce / 3; ++h) {
      ++at[h];
      asm("" : "+r"(at[h]));
    }
  }
  return filter;
}

// What half of the points make of a result: 0 or ∞, and the even and the odd part of the two others.
struct Half {
  V end, even, odd;
};

template <class Lanes>
METAFAST_INLINE void write(const Tile& t, float* out, const V (&y)[kRows], Lanes lanes) {
  if (t.rows == kRows && !t.add) {
    METAFAST_UNROLL for (int r = 0; r < kRows; ++r) store(out + r * t.out_row, y[r], lanes);
  } else {
    METAFAST_UNROLL for (int r = 0; r < kRows; ++r) if (r < t.rows) {
      float* at = out + r * t.out_row;
      store(at, t.add ? load(at, lanes) + y[r] : y[r], lanes);
    }
  }
}

template <int columns, int vectors, class Lanes>
void tile(const Tile& t, Lanes lanes) noexcept {
  Half half[2][columns][vectors];
  const float* filter = t.filters;
  METAFAST_UNROLL for (int first = 0; first < kAxis; first += kAtOnce) {
    V acc[kAtOnce][columns][vectors] = {};
    filter = add_products<columns, vectors>(t, t.x + first * t.step, filter, acc);
    METAFAST_UNROLL for (int p = 0; p < kAtOnce; p += 3) METAFAST_UNROLL for (int c = 0; c < columns; ++c)
        METAFAST_UNROLL for (int v = 0; v < vectors; ++v) half[(first + p) / 3][c][v] =
            Half{acc[p][c][v], acc[p + 1][c][v] + acc[p + 2][c][v], acc[p + 1][c][v] - acc[p + 2][c][v]};
    if (kAtOnce < kAxis && first == 0)
      asm("" : : "r"(&half) : "memory");  // else it takes the registers of the next
  }
  METAFAST_UNROLL for (int c = 0; c < columns; ++c) METAFAST_UNROLL for (int v = 0; v < vectors; ++v) {
    const Half &a = half[0][c][v], &b = half[1][c][v];
    const V bias = load(t.bias + v * L);
    const V y[kRows] = {
        a.end + (a.even + b.even) + bias,
        fma<float>(constant(kA), a.odd, fma<float>(constant(kB), b.odd, bias)),
        fma<float>(constant(kAA), a.even, fma<float>(constant(kBB), b.even, bias)),
        fma<float>(constant(kA * kAA), a.odd, fma<float>(constant(kB * kBB), b.odd, b.end)) + bias};
    float* out = t.out + c * t.out_pixel + v * L;
    if (v < vectors - 1)
      write(t, out, y, Whole{});
    else
      write(t, out, y, lanes);
  }
}

template <int columns, int vectors, class Lanes>
METAFAST_INLINE void run_tiles(Tile& t, int64_t& left, Lanes lanes) {
  for (; left >= columns; left -= columns) {
    tile<columns, vectors>(t, lanes);
    t.next.fetch_first(columns * kRows * t.out_pixel * static_cast<int64_t>(sizeof(float)));
    t.x += columns * t.pixel, t.out += columns * t.out_pixel;
  }
}

// A strip of columns of a tile of rows.
template <class Lanes>
void run_strip(Tile t, int64_t outputs, int64_t vectors, Lanes lanes) {
  if (vectors == 1) {
    run_tiles<4, 1>(t, outputs, lanes);
    run_tiles<1, 1>(t, outputs, lanes);
  } else {
    run_tiles<2, 2>(t, outputs, lanes);
    run_tiles<1, 2>(t, outputs, lanes);
  }
}

// ---- the gradient in w -----------------------------------------------------------------------------------------

// Most groups of three rows of dw whose sums at two points fill the registers.
constexpr int most_groups(int vectors) { return (kVecRegisters >= 32 ? 4 : 2) / vectors; }

struct GradientTile {
  const float* x;  // of the first of two points
  int64_t step, pixel;
  const float* dy[kRows];
  int64_t dy_pixel, columns;
  float* sums;
  int64_t sums_step, sums_row;
  float a;             // the points are ±a; unless they are 0 and ∞
  const float* below;  // two rows of the next tile, which are fetched; or null
  int64_t dy_row;
};

// Adds to sums what a stretch of columns makes of `groups` times three rows of dw, at two points.
template <bool ends, int groups, int vectors, class Lanes>
void gradient_tile(const GradientTile& t, Lanes lanes) noexcept {
  constexpr int rows = 3 * groups;
  V acc[2][rows][vectors] = {};
  const float *x[2] = {t.x, t.x + t.step}, *dy[kRows] = {t.dy[0], t.dy[1], t.dy[2], t.dy[3]};
  const float* below = t.below;
  const V a = splat(t.a), square = splat(t.a * t.a);
  auto read = [&](int r, int v) {
    return v < vectors - 1 ? load(dy[r] + v * L) : load(dy[r] + v * L, lanes);
  };
  for (int64_t left = t.columns; left > 0; --left) {
    V m[2][vectors];
    METAFAST_UNROLL for (int v = 0; v < vectors; ++v) {
      if constexpr (ends) {
        m[0][v] = read(0, v), m[1][v] = read(3, v);
      } else {
        const V even = fma<float>(square, read(2, v), read(0, v));
        const V odd = a * fma<float>(square, read(3, v), read(1, v));
        m[0][v] = even + odd, m[1][v] = even - odd;
      }
    }
    METAFAST_UNROLL for (int r = 0; r < rows; ++r) METAFAST_UNROLL for (int p = 0; p < 2; ++p) {
      V value = splat(x[p][r]);
      if (vectors > 1) keep_in_register(value);
      METAFAST_UNROLL for (int v = 0; v < vectors; ++v) acc[p][r][v] =
          fma<float>(value, m[p][v], acc[p][r][v]);
    }
    if (below)
      __builtin_prefetch(below, 0, 2), __builtin_prefetch(below + t.dy_row, 0, 2), below += t.dy_pixel;
    METAFAST_UNROLL for (int p = 0; p < 2; ++p) x[p] += t.pixel;
    METAFAST_UNROLL for (int r = 0; r < kRows; ++r) dy[r] += t.dy_pixel;
  }
  METAFAST_UNROLL for (int p = 0; p < 2; ++p) METAFAST_UNROLL for (int r = 0; r < rows; ++r)
      METAFAST_UNROLL for (int v = 0; v < vectors; ++v) {
    float* to = t.sums + p * t.sums_step + r * t.sums_row + v * L;
    store(to, load(to) + acc[p][r][v]);
  }
}

template <bool ends, int vectors, class Lanes>
void gradient_tile_of(int64_t groups, const GradientTile& t, Lanes lanes) {
  constexpr int most = most_groups(vectors);
  if (groups == 1) return gradient_tile<ends, 1, vectors>(t, lanes);
  if constexpr (most >= 2)
    if (groups == 2) return gradient_tile<ends, 2, vectors>(t, lanes);
  if constexpr (most >= 3)
    if (groups == 3) return gradient_tile<ends, 3, vectors>(t, lanes);
  if constexpr (most >= 4) return gradient_tile<ends, 4, vectors>(t, lanes);
}

struct DwPlan {
  Source source;
  PointLines points;
  int64_t strip;  // of output channels, in vectors
  int64_t row, step;
  float *sums, *zeros;  // sums: [point][taps and channels][O]; zeros: a row below the last

  DwPlan(const ConvInts& i, Carver& scratch)
      : source{nullptr, i.H, i.W, i.C, -i.ph, -i.pw},
        points(source, i.OW, scratch),
        strip(i.C <= most_groups(2) && i.O > L ? 2 : 1),
        row(round_up(i.O, strip * L)),
        step(3 * i.C * row + L) {
    sums = scratch.take<float>(kAxis * step);
    zeros = scratch.take<float>(i.OH % kRows ? i.OW * i.O : 0);
  }
};

// Adds columns [n, n + strip) of a tile of rows; dy: of its row 0.
void add_strip(const ConvInts& i, const DwPlan& p, const float* dy, int64_t rows, int64_t n, bool more) {
  const int64_t columns = min64(p.strip * L, i.O - n), vectors = (columns + L - 1) / L;
  GradientTile t{};
  t.step = p.points.step, t.pixel = p.points.pixel;
  t.dy_pixel = i.O, t.dy_row = i.OW * i.O, t.sums_step = p.step, t.sums_row = p.row;
  const Cut groups(p.points.groups, most_groups(static_cast<int>(vectors)));
  for (int64_t at = 0; at < i.OW; at += kStretch) {
    t.columns = min64(kStretch, i.OW - at);
    for (int r = 0; r < kRows; ++r) t.dy[r] = (r < rows ? dy + r * t.dy_row : p.zeros) + at * i.O + n;
    for (int64_t piece = 0; piece < groups.pieces; ++piece) {
      const int64_t row = 3 * groups.begin(piece), many = groups.begin(piece + 1) - groups.begin(piece);
      auto at_points = [&](int first, int64_t step, float a, auto ends, int below) {
        t.x = p.points.p + first * p.points.step + at * p.points.pixel + row;
        t.sums = p.sums + first * p.step + row * p.row + n;
        t.step = step * p.points.step, t.sums_step = step * p.step, t.a = a;
        t.below = more && piece == 0 && !ends ? dy + (kRows + below) * t.dy_row + at * i.O + n : nullptr;
        auto run = [&](auto lanes) {
          if (vectors == 1)
            gradient_tile_of<ends, 1>(many, t, lanes);
          else
            gradient_tile_of<ends, 2>(many, t, lanes);
        };
        if (columns == vectors * L)
          run(Whole{});
        else
          run(Mask<float>(columns - (vectors - 1) * L));
      };
      at_points(kPlace[2], 1, static_cast<float>(kA), std::false_type{}, 0);
      at_points(kPlace[4], 1, static_cast<float>(kB), std::false_type{}, 2);
      at_points(kPlace[1], kPlace[0] - kPlace[1], 0, std::true_type{}, 0);
    }
  }
}

void write_gradient(const ConvInts& i, const DwPlan& p, Range columns, float* dw) {
  for (int64_t k = 0; k < 3 * i.C; ++k)
    each_vector<float>(columns, [&](int64_t o, auto lanes) {
      V t[kAxis], g[3];
      METAFAST_UNROLL for (int q = 0; q < kAxis; ++q) t[q] =
          load(p.sums + kPlace[q] * p.step + k * p.row + o);
      filter_to_points_adjoint(t, g);
      float* out = dw + k / i.C * i.w_skw + k % i.C * i.w_sc + o * i.w_so;
      METAFAST_UNROLL for (int l = 0; l < 3; ++l) {
        float* to = out + l * i.w_skh;
        if (i.w_so == 1) {
          store(to, i.mode ? load(to, lanes) + g[l] : g[l], lanes);
          continue;
        }
        float apart[L];
        store(apart, g[l]);
        for (int64_t j = 0; j < min64(L, columns.end - o); ++j)
          to[j * i.w_so] = i.mode ? to[j * i.w_so] + apart[j] : apart[j];
      }
    });
}

}  // namespace

bool winograd_down_suits(const Correlation<float>& c) noexcept {
  return is_three_by_three(c) &&
         winograd_down_pays(c.v.outputs, c.h.outputs, c.images, c.channels, c.columns);
}

bool winograd_down_dw_suits(const ConvInts& i) noexcept {
  return is_three_by_three(i) && winograd_down_pays(i.OH, i.OW, i.N, i.C, i.O);
}

int winograd_down_correlate(const Correlation<float>& c, const Args& a) noexcept {
  Carver scratch(a.scratch);
  const CorrelationPlan p(c, scratch);
  const int64_t tiles = tiles_of(c.v.outputs);
  const Range mine = share(c.images * tiles, a.part, a.parts);
  if (mine.begin == mine.end) return kOk;
  p.points.clear();
  p.filters.fill(c, p.weights);
  zero_run(p.bias, round_up(c.columns, kStrip));
  if (c.bias) copy_run(p.bias, c.bias, c.columns);
  const bool large = c.images * c.v.outputs * c.out_row * static_cast<int64_t>(sizeof(float)) >= kLargeBytes;
  Tile t{};
  t.x = p.points.p, t.step = p.points.step, t.pixel = p.points.pixel, t.run = p.filters.run;
  t.out_row = c.out_row, t.out_pixel = c.out_pixel, t.add = c.add;
  for (int64_t at = mine.begin; at < mine.end; ++at) {
    const int64_t image = at / tiles, top = at % tiles * kRows;
    p.points.fill(p.source, c.source + image * c.height * c.width * c.channels, at % tiles);
    float* out = c.out + image * c.out_image + top * c.out_row;
    t.rows = min64(kRows, c.v.outputs - top);
    for (int64_t n = 0; n < c.columns; n += kStrip) {
      const int64_t columns = min64(kStrip, c.columns - n), vectors = (columns + L - 1) / L;
      t.filters = p.filters.at(n, 0, 0), t.out = out + n, t.bias = p.bias + n;
      t.next = large && n == 0 ? Ahead::of(out + kRows * c.out_row, out + 2 * kRows * c.out_row) : Ahead{};
      if (columns == vectors * L)
        run_strip(t, c.h.outputs, vectors, Whole{});
      else
        run_strip(t, c.h.outputs, vectors, Mask<float>(columns - (vectors - 1) * L));
    }
  }
  return kOk;
}

int winograd_down_dw(const ConvInts& i, const Args& a) noexcept {
  Carver scratch(a.scratch);
  const DwPlan p(i, scratch);
  const float *x = static_cast<const float*>(a.ptr[0]), *dy = static_cast<const float*>(a.ptr[1]);
  const int64_t tiles = tiles_of(i.OH), unit = p.strip * L;
  const bool large = i.N * i.OH * i.OW * i.O * static_cast<int64_t>(sizeof(float)) >= kLargeBytes;
  p.points.clear();
  if (i.OH % kRows) zero_run(p.zeros, i.OW * i.O);
  each_piece(i, i.N * tiles, i.O, unit, a, [&](int64_t piece, Range columns, Range rows) {
    for (int64_t k = 0; k < kAxis * 3 * i.C; ++k)
      zero_run(p.sums + k / (3 * i.C) * p.step + k % (3 * i.C) * p.row + columns.begin,
               round_up(columns.end - columns.begin, unit));
    for (int64_t at = rows.begin; at < rows.end; ++at) {
      const int64_t image = at / tiles, top = at % tiles * kRows;
      p.points.fill(p.source, x + image * i.H * i.W * i.C, at % tiles);
      const float* from = dy + (image * i.OH + top) * i.OW * i.O;
      for (int64_t n = columns.begin; n < columns.end; n += unit)
        add_strip(i, p, from, min64(kRows, i.OH - top), n, large && at + 1 < rows.end);
    }
    write_gradient(i, p, columns, static_cast<float*>(a.ptr[2]) + piece * i.weights());
  });
  return kOk;
}

int64_t winograd_down_correlate_scratch(const Correlation<float>& c) noexcept {
  Carver counter(nullptr);
  CorrelationPlan(c, counter);
  return counter.used();
}

int64_t winograd_down_dw_scratch(const ConvInts& i) noexcept {
  Carver counter(nullptr);
  DwPlan(i, counter);
  return counter.used();
}

}  // namespace metafast::kernels::METAFAST_ISA
