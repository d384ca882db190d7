#include "winograd.hpp"

#include <utility>

#include "ahead.hpp"
#include "tile.hpp"
#include "winograd_axis.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

constexpr int kLanesF = kLanes<float>;
constexpr int kPoints = kAxis * kAxis;
constexpr int64_t kBlockBytes = 384 * 1024;  // transformed tiles of a block: they stay in the second cache
constexpr int64_t kLine = 16;  // elements that keep the points' streams out of the same cache sets

constexpr int kStripVectors = 2;
constexpr int64_t kStrip = kStripVectors * kLanesF;  // columns whose products are taken together

// How many channels' products are summed one after the other before the sum is added to others: most of the error
// arises here, and grows with the square root of it.
constexpr int64_t chain_length(int64_t channels) { return channels < 64 ? 16 : 32; }

// A square of vectors in memory: that in row i and column j is at p + i * row + j * column.
template <class Element>
struct Square {
  Element* p;
  int64_t row, column;
};

METAFAST_INLINE void advance(auto*& p, int64_t by) {
  p += by;
  asm("" : "+r"(p));  // else the compiler keeps an address for every vector, on the stack
}

// Transforms both axes of a square of vectors, whose columns read(j, column) reads and write(i, row) takes.
template <int from, int to, class Transform, class Read, class Write>
METAFAST_INLINE void transform_square(Transform transform, Read read, Write write) {
  V half[to][from];
  METAFAST_UNROLL for (int j = 0; j < from; ++j) {
    V in[from], out[to];
    read(j, in);
    transform(in, out);
    METAFAST_UNROLL for (int i = 0; i < to; ++i) half[i][j] = out[i];
  }
  METAFAST_UNROLL for (int i = 0; i < to; ++i) {
    V out[to];
    transform(half[i], out);
    write(i, out);
  }
}

// Reads columns of a square, and writes rows of one.
template <class Lanes>
METAFAST_INLINE auto columns_of(Square<const float> s, Lanes lanes) {
  return [s, lanes](int, auto& in) mutable {
    int i = 0;
    METAFAST_UNROLL for (V& v : in) v = load(s.p + i++ * s.row, lanes);
    advance(s.p, s.column);
  };
}
METAFAST_INLINE auto rows_of(Square<float> s) {
  return [s](int, const auto& out) mutable {
    int j = 0;
    METAFAST_UNROLL for (const V& v : out) store(s.p + j++ * s.column, v);
    advance(s.p, s.row);
  };
}

// An axis of outputs in tiles of 4, then tiles of 3.
struct Cut {
  int64_t wide, narrow;
  static Cut of(int64_t outputs) {
    const int64_t tiles = (outputs + 3) / 4, narrow = min64(tiles, 4 * tiles - outputs);
    return {tiles - narrow, narrow};
  }
  int64_t tiles() const { return wide + narrow; }
  int64_t points() const { return kAxis * wide + (kAxis - 1) * narrow; }
  int64_t start(int64_t tile) const { return 4 * tile - max64(0, tile - wide); }
  int64_t size(int64_t tile) const { return tile < wide ? 4 : 3; }
};

// The tiles of a set of images, in blocks of rows of tiles.
struct Tiling {
  int64_t images;
  Cut down, across;
  int64_t block_rows;

  // per_tile: elements of scratch a tile takes.
  static Tiling of(int64_t images, int64_t height, int64_t width, int64_t per_tile) {
    Tiling t{images, Cut::of(height), Cut::of(width), 0};
    const int64_t most = kBlockBytes / (per_tile * static_cast<int64_t>(sizeof(float)));
    t.block_rows = max64(1, min64(t.rows(), most / t.across.tiles()));
    return t;
  }
  int64_t rows() const { return images * down.tiles(); }
  int64_t most_tiles() const { return block_rows * across.tiles(); }
};

// Rows [begin, end) of tiles of a tiling. Its tiles lie in the order
//   wide rows: narrow tiles | wide rows: wide tiles | narrow rows: wide tiles | narrow rows: narrow tiles
// so that those which have a point, at infinity or not, lie together.
struct Block {
  const Tiling& t;
  int64_t begin, end;
  int64_t wide_rows, narrow_rows;

  Block(const Tiling& tiling, int64_t from, int64_t to)
      : t(tiling), begin(from), end(to), wide_rows(wide_before(to) - wide_before(from)) {
    narrow_rows = to - from - wide_rows;
  }
  int64_t wide_before(int64_t row) const {
    return row / t.down.tiles() * t.down.wide + min64(row % t.down.tiles(), t.down.wide);
  }
  int64_t place(int64_t row, int64_t tile) const {
    const int64_t wide_above = wide_before(row) - wide_before(begin), narrow_above = row - begin - wide_above;
    const bool wide_row = row % t.down.tiles() < t.down.wide, wide_tile = tile < t.across.wide;
    const int64_t above = wide_row ? wide_above : narrow_above;
    int64_t at = wide_row ? 0 : wide_rows * t.across.tiles();
    if (wide_row && wide_tile) at += wide_rows * t.across.narrow;
    if (!wide_row && !wide_tile) at += narrow_rows * t.across.wide;
    return at + (wide_tile ? above * t.across.wide + tile : above * t.across.narrow + tile - t.across.wide);
  }
  // The tiles that have the point.
  Range having(int point) const {
    const bool last_row = point / kAxis == 0, last_column = point % kAxis == 0;
    return {last_column ? wide_rows * t.across.narrow : 0,
            wide_rows * t.across.tiles() +
                (last_row ? 0 : narrow_rows * (last_column ? t.across.wide : t.across.tiles()))};
  }
  // Calls visit(image, first row, one past the last row) for the rows of each image.
  template <class Visit>
  METAFAST_INLINE void each_image(Visit visit) const {
    const int64_t down = t.down.tiles();
    for (int64_t r = begin; r < end;) {
      const int64_t image = r / down, stop = min64(end, (image + 1) * down);
      visit(image, r, stop);
      r = stop;
    }
  }
};

// Where images come from: dense, channels last; output (0, 0) reads from row `top` and column `left` onwards.
struct Source {
  const float* p;
  int64_t height, width, channels, top, left;
};

// What a block reads of the source; and its part of an array with `line` elements for each row of outputs.
Ahead read_by(const Source& s, const Block& b) {
  const int64_t down = b.t.down.tiles(), line = s.width * s.channels;
  auto row = [&](int64_t tile_row, int64_t more) {
    const int64_t at = b.t.down.start(tile_row % down) + s.top + more;
    return tile_row / down * s.height + max64(0, min64(at, s.height));
  };
  if (b.begin >= b.end) return {};
  return Ahead::of(s.p + row(b.begin, 0) * line, s.p + row(b.end - 1, kAxis) * line);
}
Ahead share_of(const float* p, const Block& b, int64_t outputs, int64_t line) {
  const int64_t down = b.t.down.tiles();
  auto row = [&](int64_t tile_row) {
    return tile_row / down * outputs + min64(b.t.down.start(tile_row % down), outputs);
  };
  return Ahead::of(p + row(b.begin) * line, p + row(b.end) * line);
}

// Transformed tiles: a matrix (tiles, stride) for every point.
struct Points {
  float* p;
  int64_t stride, step;  // from tile to tile, from point to point

  Points(int64_t tiles, int64_t columns, Carver& scratch)
      : stride(round_up(columns, kLanesF)), step(round_up(tiles * stride, kLine) + kLine) {
    p = scratch.take<float>(kPoints * step);
  }
};

int64_t window_columns(const Tiling& t) { return 4 * t.across.tiles() + 2; }

// Enough for the rows that a block has of one image, each tile read as a wide one.
float* take_window(const Tiling& t, int64_t channels, Carver& scratch) {
  return scratch.take<float>((4 * min64(t.block_rows, t.down.tiles()) + 2) * window_columns(t) * channels);
}

// Bᵀ d B of channels [begin, end) of a block's tiles.
void input_block(const Source& s, const Block& b, const Points& v, float* window, Range channels) {
  const Cut &down = b.t.down, &across = b.t.across;
  const int64_t line = window_columns(b.t) * s.channels;
  b.each_image([&](int64_t image, int64_t begin, int64_t end) {
    const int64_t first = begin % down.tiles(), last = first + end - begin - 1;
    const Window w{down.start(first) + s.top, s.left, down.start(last) + kAxis - down.start(first),
                   window_columns(b.t)};
    copy_window(window, s.p + image * s.height * s.width * s.channels, s.height, s.width, s.channels, w);
    for (int64_t r = begin; r < end; ++r)
      for (int64_t j = 0; j < across.tiles(); ++j) {
        const float* src =
            window + (down.start(r % down.tiles()) - down.start(first)) * line + across.start(j) * s.channels;
        float* dst = v.p + b.place(r, j) * v.stride;
        each_vector<float>(channels, [&](int64_t c, auto lanes) {
          transform_square<kAxis, kAxis>(to_points, columns_of({src + c, line, s.channels}, lanes),
                                         rows_of({dst + c, kAxis * v.step, v.step}));
        });
      }
  });
}

int64_t strip_vectors(int64_t columns) {
  const int64_t total = (columns + kLanesF - 1) / kLanesF;
  return total == 1 ? 1 : (total == 3 ? 3 : 2);
}

// Where transformed filters lie: [strips of columns][points], each (channels, kStrip).
struct Filters {
  float* p;
  int64_t step;  // from point to point

  static int64_t step_of(const Correlation<float>& c) { return c.channels * kStrip + kLine; }
  static int64_t elements(const Correlation<float>& c) {
    return round_up(c.columns, kStrip) / kStrip * kPoints * step_of(c);
  }
  // Of the strip that begins at column n.
  float* at(int64_t n, int point) const { return p + (n / kStrip * kPoints + point) * step; }
};

// Of columns `some`, which begin a strip.
void transform_filters(const Correlation<float>& c, const PackedWeights<float>& weights,
                       const Filters& filters, Range some) {
  weights.fill(c, 3, 3, some);
  const int64_t C = c.channels;
  for (int64_t n = some.begin; n < some.end; n += kStrip)
    for (int64_t k = 0; k < C * kStrip; k += kLanesF) {
      const float* src = weights.packed + n * weights.depth + k;
      transform_square<3, kAxis>(filter_to_points, columns_of({src, 3 * C * kStrip, C * kStrip}, Whole{}),
                                 rows_of({filters.at(n, 0) + k, kAxis * filters.step, filters.step}));
    }
}

struct CorrelationPlan {
  Tiling tiling;
  Filters filters;
  Points inputs, products;  // products: of one strip
  float* window;

  CorrelationPlan(const Correlation<float>& c, Carver& scratch)
      : tiling(Tiling::of(c.images, c.v.outputs, c.h.outputs, kPoints * (c.channels + kStrip))),
        filters{c.transformed ? const_cast<float*>(c.w) : scratch.take<float>(Filters::elements(c)),
                Filters::step_of(c)},
        inputs(tiling.most_tiles(), c.channels, scratch),
        products(tiling.most_tiles(), kStrip, scratch),
        window(take_window(tiling, c.channels, scratch)) {}
};

PackedWeights<float> packed_weights(const Correlation<float>& c, Carver& scratch) {
  return PackedWeights<float>(c, kStrip, 9, scratch);
}

// c(r, n) = sum over k of a(r, k) b(k, n) for one strip of columns n; a is (rows, k) of row stride a_rs, b and c
// have rows of a strip.
template <int rows>
void multiply_rows(const float* a, int64_t a_rs, const float* b, int64_t depth, float* c) noexcept {
  const int64_t chain = chain_length(depth);
  for (int64_t k = 0; k < depth; k += chain) {
    V acc[rows][kStripVectors] = {};
    constexpr int bases = (rows + 2) / 3;
    const float* at[bases];
    METAFAST_UNROLL for (int g = 0; g < bases; ++g) at[g] = a + 3 * g * a_rs;
    for (int64_t j = min64(chain, depth - k); j > 0; --j) {
      V row[kStripVectors];
      METAFAST_UNROLL for (int v = 0; v < kStripVectors; ++v) row[v] = load(b + v * kLanesF);
      METAFAST_UNROLL for (int r = 0; r < rows; ++r) {
        const V x = splat(at[r / 3][r % 3 * a_rs]);
        METAFAST_UNROLL for (int v = 0; v < kStripVectors; ++v) acc[r][v] = fma<float>(x, row[v], acc[r][v]);
      }
      METAFAST_UNROLL for (int g = 0; g < bases; ++g) advance(at[g], 1);
      b += kStrip;
    }
    a += chain;
    METAFAST_UNROLL for (int r = 0; r < rows; ++r) METAFAST_UNROLL for (int v = 0; v < kStripVectors; ++v) {
      float* to = c + r * kStrip + v * kLanesF;
      store(to, k > 0 ? acc[r][v] + load(to) : acc[r][v]);
    }
  }
}

using MultiplyRows = void (*)(const float*, int64_t, const float*, int64_t, float*) noexcept;
constexpr int kMostRows = max_tile_rows(kStripVectors);

template <int... rows>
constexpr MultiplyRows find_multiply(std::integer_sequence<int, rows...>, int64_t wanted) {
  constexpr MultiplyRows all[] = {multiply_rows<rows + 1>...};
  return all[wanted - 1];
}

// products[point] = inputs[point] × filters[point], of the strip of columns that begins at n.
void multiply_points(const Correlation<float>& c, const CorrelationPlan& p, const Block& b, int64_t n,
                     const Ahead (&ahead)[2]) {
  for (int point = 0; point < kPoints; ++point) {
    for (const Ahead& some : ahead) some.fetch(point, kPoints);
    const Range tiles = b.having(point);
    const float* in = p.inputs.p + point * p.inputs.step + tiles.begin * p.inputs.stride;
    float* out = p.products.p + point * p.products.step + tiles.begin * p.products.stride;
    for (int64_t left = tiles.end - tiles.begin; left > 0;) {
      const int64_t rows = next_tile_rows(left, kMostRows);
      find_multiply(std::make_integer_sequence<int, kMostRows>(), rows)(
          in, p.inputs.stride, p.filters.at(n, point), c.channels, out);
      in += rows * p.inputs.stride, out += rows * kStrip, left -= rows;
    }
  }
}

// Aᵀ m A of a block's tiles, in columns [n, n + strip).
void output_block(const Correlation<float>& c, const CorrelationPlan& p, const Block& b, int64_t n) {
  const Cut &down = b.t.down, &across = b.t.across;
  const Range columns{n, min64(n + kStrip, c.columns)};
  for (int64_t r = b.begin; r < b.end; ++r)
    for (int64_t j = 0; j < across.tiles(); ++j) {
      const int64_t i = r % down.tiles(), top = down.start(i), left = across.start(j);
      const int64_t rows = min64(down.size(i), c.v.outputs - top),
                    pixels = min64(across.size(j), c.h.outputs - left);
      const float* src = p.products.p + b.place(r, j) * p.products.stride - n;
      float* out = c.out + r / down.tiles() * c.out_image + top * c.out_row + left * c.out_pixel;
      each_vector<float>(columns, [&](int64_t o, auto lanes) {
        const V bias = c.bias ? load(c.bias + o, lanes) : V{};
        float* to = out + o;
        transform_square<kAxis, 4>(from_points,
                                   columns_of({src + o, kAxis * p.products.step, p.products.step}, Whole{}),
                                   [&](int k, const V(&y)[4]) {
                                     if (k >= rows) return;
                                     METAFAST_UNROLL for (int l = 0; l < 4; ++l) if (l < pixels) {
                                       float* at = to + l * c.out_pixel;
                                       const V value = c.bias ? y[l] + bias : y[l];
                                       store(at, c.add ? load(at, lanes) + value : value, lanes);
                                     }
                                     advance(to, c.out_row);
                                   });
      });
    }
}

struct DwPlan {
  Tiling tiling;
  Points inputs, outputs;  // Bᵀ d B and A dy Aᵀ
  Points sums;             // (C, O)
  float* window;

  DwPlan(const ConvInts& i, Carver& scratch)
      : tiling(Tiling::of(i.N, i.OH, i.OW, kPoints * (i.C + i.O))),
        inputs(tiling.most_tiles(), i.C, scratch),
        outputs(tiling.most_tiles(), i.O, scratch),
        sums(i.C, i.O, scratch),
        window(take_window(tiling, i.C, scratch)) {}
};

void gradient_block(const ConvInts& i, const DwPlan& p, const Block& b, const float* dy) {
  const Cut &down = b.t.down, &across = b.t.across;
  for (int64_t r = b.begin; r < b.end; ++r)
    for (int64_t j = 0; j < across.tiles(); ++j) {
      const int64_t k = r % down.tiles(), top = down.start(k), left = across.start(j);
      const int64_t rows = min64(down.size(k), i.OH - top), pixels = min64(across.size(j), i.OW - left);
      const float* src = dy + ((r / down.tiles() * i.OH + top) * i.OW + left) * i.O;
      float* dst = p.outputs.p + b.place(r, j) * p.outputs.stride;
      each_vector<float>({0, i.O}, [&](int64_t o, auto lanes) {
        const float* from = src + o;
        transform_square<4, kAxis>(
            from_points_adjoint,
            [&](int x, V(&y)[4]) {
              METAFAST_UNROLL for (int l = 0; l < 4; ++l) y[l] =
                  l < rows && x < pixels ? load(from + l * i.OW * i.O, lanes) : V{};
              advance(from, i.O);
            },
            rows_of({dst + o, kAxis * p.outputs.step, p.outputs.step}));
      });
    }
}

// sums[point] (+)= inputs[point]ᵀ × outputs[point], rows `channels`.
void add_points(const ConvInts& i, const DwPlan& p, const Block& b, Range channels, bool add,
                const Ahead (&ahead)[2]) {
  const int64_t zero = 0, vectors = strip_vectors(i.O), strip = vectors * kLanesF;
  TileCall<float> call{};
  call.a_rs = 1, call.a_cs = p.inputs.stride;
  call.segment = &zero, call.segments = 1;
  call.b_rs = p.outputs.stride, call.c_rs = p.sums.stride, call.last = kLanesF, call.add = add;
  for (int point = 0; point < kPoints; ++point) {
    for (const Ahead& some : ahead) some.fetch(point, kPoints);
    const Range tiles = b.having(point);
    call.length = tiles.end - tiles.begin;
    for (int64_t o = 0; o < i.O; o += strip) {
      call.a = p.inputs.p + point * p.inputs.step + tiles.begin * p.inputs.stride + channels.begin;
      call.b = p.outputs.p + point * p.outputs.step + tiles.begin * p.outputs.stride + o;
      call.c = p.sums.p + point * p.sums.step + channels.begin * p.sums.stride + o;
      run_strip<float>(call, channels.end - channels.begin, (min64(strip, i.O - o) + kLanesF - 1) / kLanesF);
    }
  }
}

void write_gradient(const ConvInts& i, const DwPlan& p, Range channels, float* dw) {
  for (int64_t c = channels.begin; c < channels.end; ++c)
    each_vector<float>({0, i.O}, [&](int64_t o, auto lanes) {
      const float* src = p.sums.p + c * p.sums.stride + o;
      float* out = dw + c * i.w_sc + o * i.w_so;
      transform_square<kAxis, 3>(filter_to_points_adjoint,
                                 columns_of({src, kAxis * p.sums.step, p.sums.step}, Whole{}),
                                 [&](int k, const V(&g)[3]) {
                                   METAFAST_UNROLL for (int l = 0; l < 3; ++l) {
                                     float* to = out + k * i.w_skh + l * i.w_skw;
                                     if (i.w_so == 1) {
                                       store(to, i.mode ? load(to, lanes) + g[l] : g[l], lanes);
                                       continue;
                                     }
                                     for (int64_t j = 0; j < min64(kLanesF, i.O - o); ++j)
                                       to[j * i.w_so] = i.mode ? to[j * i.w_so] + g[l][j] : g[l][j];
                                   }
                                 });
    });
}

}  // namespace

bool winograd_suits(const Correlation<float>& c) noexcept {
  return is_three_by_three(c) && winograd_pays(c.v.outputs, c.h.outputs, c.images, c.channels, c.columns);
}

bool winograd_dw_suits(const ConvInts& i) noexcept {
  return is_three_by_three(i) && winograd_pays(i.OH, i.OW, i.N, i.C, i.O);
}

int winograd_correlate(const Correlation<float>& c, const Args& a) noexcept {
  Carver scratch(a.scratch);
  const CorrelationPlan p(c, scratch);
  const Source source{c.source, c.height, c.width, c.channels, c.v.low, c.h.low};
  const Range mine = share(p.tiling.rows(), a.part, a.parts);
  if (mine.begin == mine.end) return kOk;
  if (!c.transformed) transform_filters(c, packed_weights(c, scratch), p.filters, {0, c.columns});
  for (int64_t r = mine.begin; r < mine.end; r += p.tiling.block_rows) {
    const Block b(p.tiling, r, min64(r + p.tiling.block_rows, mine.end));
    const Block next(p.tiling, b.end, min64(b.end + p.tiling.block_rows, mine.end));
    input_block(source, b, p.inputs, p.window, {0, c.channels});
    for (int64_t n = 0; n < c.columns; n += kStrip) {
      const Ahead none{}, results = share_of(c.out, b, c.v.outputs, c.out_row);
      multiply_points(c, p, b, n, {n ? none : results, n ? none : read_by(source, next)});
      output_block(c, p, b, n);
    }
  }
  return kOk;
}

int winograd_dw(const ConvInts& i, const Args& a) noexcept {
  Carver scratch(a.scratch);
  const DwPlan p(i, scratch);
  const Source source{static_cast<const float*>(a.ptr[0]), i.H, i.W, i.C, -i.ph, -i.pw};
  const float* dy = static_cast<const float*>(a.ptr[1]);
  each_piece(i, p.tiling.rows(), i.C, kLanesF, a, [&](int64_t piece, Range channels, Range rows) {
    bool add = false;
    for (int64_t r = rows.begin; r < rows.end; r += p.tiling.block_rows, add = true) {
      const Block b(p.tiling, r, min64(r + p.tiling.block_rows, rows.end));
      const Block next(p.tiling, b.end, min64(b.end + p.tiling.block_rows, rows.end));
      input_block(source, b, p.inputs, p.window, channels);
      gradient_block(i, p, b, dy);
      add_points(i, p, b, channels, add, {read_by(source, next), share_of(dy, next, i.OH, i.OW * i.O)});
    }
    write_gradient(i, p, channels, static_cast<float*>(a.ptr[2]) + piece * i.weights());
  });
  return kOk;
}

int winograd_transform(const Correlation<float>& c, float* into, const Args& a) noexcept {
  Carver scratch(a.scratch);
  const Range mine = share(c.columns, a.part, a.parts, kStrip);
  if (mine.begin < mine.end)
    transform_filters(c, packed_weights(c, scratch), {into, Filters::step_of(c)}, mine);
  return kOk;
}

int64_t winograd_transform_scratch(const Correlation<float>& c) noexcept {
  Carver counter(nullptr);
  packed_weights(c, counter);
  return counter.used();
}

int64_t winograd_correlate_scratch(const Correlation<float>& c) noexcept {
  Carver counter(nullptr);
  CorrelationPlan(c, counter);
  if (!c.transformed) packed_weights(c, counter);
  return counter.used();
}

int64_t winograd_dw_scratch(const ConvInts& i) noexcept {
  Carver counter(nullptr);
  DwPlan(i, counter);
  return counter.used();
}

}  // namespace metafast::kernels::METAFAST_ISA
