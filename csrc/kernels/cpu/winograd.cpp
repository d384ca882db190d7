#include "winograd.hpp"

#include "tile.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

constexpr int kPoints = 16;
constexpr int64_t kBlockBytes = 400 * 1024;  // transformed tiles of a block: they stay in the second cache
constexpr int64_t kLine = 16;  // elements that keep the points' streams out of the same cache sets

// Bᵀ t B of a 4×4 tile of vectors.
template <class T>
METAFAST_INLINE void transform_input(Vec<T> (&t)[4][4]) {
  METAFAST_UNROLL for (int j = 0; j < 4; ++j) {
    const Vec<T> a = t[0][j], b = t[1][j], c = t[2][j], d = t[3][j];
    t[0][j] = a - c, t[1][j] = b + c, t[2][j] = c - b, t[3][j] = b - d;
  }
  METAFAST_UNROLL for (int i = 0; i < 4; ++i) {
    const Vec<T> a = t[i][0], b = t[i][1], c = t[i][2], d = t[i][3];
    t[i][0] = a - c, t[i][1] = b + c, t[i][2] = c - b, t[i][3] = b - d;
  }
}

// Aᵀ t A: the 2×2 results of 4×4 products.
template <class T>
METAFAST_INLINE void transform_output(const Vec<T> (&t)[4][4], Vec<T> (&y)[2][2]) {
  Vec<T> s[2][4];
  METAFAST_UNROLL for (int j = 0; j < 4; ++j) {
    s[0][j] = (t[0][j] + t[1][j]) + t[2][j], s[1][j] = (t[1][j] - t[2][j]) - t[3][j];
  }
  METAFAST_UNROLL for (int i = 0; i < 2; ++i) {
    y[i][0] = (s[i][0] + s[i][1]) + s[i][2], y[i][1] = (s[i][1] - s[i][2]) - s[i][3];
  }
}

// A t Aᵀ: the adjoint of transform_output.
template <class T>
METAFAST_INLINE void transform_output_adjoint(const Vec<T> (&y)[2][2], Vec<T> (&t)[4][4]) {
  METAFAST_UNROLL for (int i = 0; i < 4; ++i) {
    Vec<T> s[2];
    METAFAST_UNROLL for (int j = 0; j < 2; ++j) s[j] =
        i == 0 ? y[0][j] : (i == 1 ? y[0][j] + y[1][j] : (i == 2 ? y[0][j] - y[1][j] : -y[1][j]));
    t[i][0] = s[0], t[i][1] = s[0] + s[1], t[i][2] = s[0] - s[1], t[i][3] = -s[1];
  }
}

// G g Gᵀ of a 3×3 filter.
template <class T>
METAFAST_INLINE void transform_filter(const Vec<T> (&g)[3][3], Vec<T> (&t)[4][4]) {
  const Vec<T> half = splat(T(0.5));
  Vec<T> s[4][3];
  METAFAST_UNROLL for (int j = 0; j < 3; ++j) {
    const Vec<T> even = half * (g[0][j] + g[2][j]), odd = half * g[1][j];
    s[0][j] = g[0][j], s[1][j] = even + odd, s[2][j] = even - odd, s[3][j] = g[2][j];
  }
  METAFAST_UNROLL for (int i = 0; i < 4; ++i) {
    const Vec<T> even = half * (s[i][0] + s[i][2]), odd = half * s[i][1];
    t[i][0] = s[i][0], t[i][1] = even + odd, t[i][2] = even - odd, t[i][3] = s[i][2];
  }
}

// Gᵀ t G: the adjoint of transform_filter.
template <class T>
METAFAST_INLINE void transform_filter_adjoint(const Vec<T> (&t)[4][4], Vec<T> (&g)[3][3]) {
  const Vec<T> half = splat(T(0.5));
  Vec<T> s[3][4];
  METAFAST_UNROLL for (int j = 0; j < 4; ++j) {
    const Vec<T> even = half * (t[1][j] + t[2][j]);
    s[0][j] = t[0][j] + even, s[1][j] = half * (t[1][j] - t[2][j]), s[2][j] = even + t[3][j];
  }
  METAFAST_UNROLL for (int i = 0; i < 3; ++i) {
    const Vec<T> even = half * (s[i][1] + s[i][2]);
    g[i][0] = s[i][0] + even, g[i][1] = half * (s[i][1] - s[i][2]), g[i][2] = even + s[i][3];
  }
}

// The tiles of a set of images and their cut into blocks: some whole images, or some rows of tiles of one.
struct Tiling {
  int64_t images, down, across;  // tiles of an image
  int64_t block_images, block_rows, blocks_per_image;

  // per_tile: elements of scratch a tile takes.
  template <class T>
  static Tiling of(int64_t images, int64_t height, int64_t width, int64_t per_tile) {
    Tiling t{images, (height + 1) / 2, (width + 1) / 2, 1, 0, 1};
    const int64_t most = max64(28, kBlockBytes / (per_tile * static_cast<int64_t>(sizeof(T))));
    t.block_rows = max64(1, min64(t.down, most / t.across));
    if (t.block_rows == t.down) t.block_images = max64(1, min64(images, most / (t.down * t.across)));
    t.blocks_per_image = (t.down + t.block_rows - 1) / t.block_rows;
    return t;
  }
  int64_t most_tiles() const { return block_images * block_rows * across; }
  int64_t blocks() const { return (images + block_images - 1) / block_images * blocks_per_image; }
};

struct Block {
  int64_t image, images, row, rows;
  static Block at(const Tiling& t, int64_t k) {
    const int64_t image = k / t.blocks_per_image * t.block_images,
                  row = k % t.blocks_per_image * t.block_rows;
    return {image, min64(t.block_images, t.images - image), row, min64(t.block_rows, t.down - row)};
  }
  int64_t tiles(const Tiling& t) const { return images * rows * t.across; }
};

// Where images come from: dense, channels last; tile (i, j) reads rows 2 i + top and columns 2 j + left onwards.
template <class T>
struct Source {
  const T* p;
  int64_t height, width, channels, top, left;
};

// Transformed tiles: 16 matrices (tiles, stride), one a point.
template <class T>
struct Points {
  T* p;
  int64_t stride, step;  // from tile to tile, from point to point

  Points(int64_t tiles, int64_t columns, Carver& scratch)
      : stride(round_up(columns, kLanes<T>)), step(round_up(tiles * stride, kLine) + kLine) {
    p = scratch.take<T>(kPoints * step);
  }
};

template <class T>
int64_t window_elements(const Tiling& t, int64_t channels) {
  return (2 * t.block_rows + 2) * (2 * t.across + 2) * channels;
}

// Channels [first, first + count) of one 4×4 tile.
template <class T>
METAFAST_INLINE void input_tile(const T* src, int64_t line, int64_t pixel, T* dst, int64_t step,
                                Range channels) {
  constexpr int L = kLanes<T>;
  for (int64_t c = channels.begin; c < channels.end; c += L) {
    const Mask<T> mask(min64(L, channels.end - c));
    Vec<T> t[4][4];
    METAFAST_UNROLL for (int i = 0; i < 4; ++i) METAFAST_UNROLL for (int j = 0; j < 4; ++j) t[i][j] =
        load(src + i * line + j * pixel + c, mask);
    transform_input<T>(t);
    METAFAST_UNROLL for (int i = 0; i < 4; ++i) METAFAST_UNROLL for (int j = 0; j < 4; ++j)
        store(dst + (4 * i + j) * step + c, t[i][j]);
  }
}

template <class T>
void input_block(const Source<T>& s, const Tiling& t, const Block& b, const Points<T>& v, T* window,
                 Range channels) {
  T* dst = v.p;
  for (int64_t n = b.image; n < b.image + b.images; ++n) {
    const Window w{2 * b.row + s.top, s.left, 2 * b.rows + 2, 2 * t.across + 2};
    const T* src = s.p + n * s.height * s.width * s.channels;
    int64_t line = s.width * s.channels;
    if (w.inside(s.height, s.width)) {
      src += w.top * line + w.left * s.channels;
    } else {
      copy_window(window, src, s.height, s.width, s.channels, w);
      src = window, line = w.columns * s.channels;
    }
    for (int64_t i = 0; i < b.rows; ++i)
      for (int64_t j = 0; j < t.across; ++j, dst += v.stride)
        input_tile(src + 2 * i * line + 2 * j * s.channels, line, s.channels, dst, v.step, channels);
  }
}

template <class T>
struct CorrelationPlan {
  Tiling tiling;
  PackedWeights<T> weights;
  T* filters;  // [points][strips][channels][strip]
  int64_t filter_step;
  Points<T> inputs, products;
  T* window;

  CorrelationPlan(const Correlation<T>& c, Carver& scratch)
      : tiling(Tiling::of<T>(c.images, c.v.outputs, c.h.outputs, kPoints * (c.channels + c.columns))),
        weights(c, strip_vectors(c.columns) * kLanes<T>, 9, scratch),
        filters(nullptr),
        filter_step(round_up(c.columns, weights.strip) * c.channels + kLine),
        inputs(tiling.most_tiles(), c.channels, scratch),
        products(tiling.most_tiles(), c.columns, scratch) {
    filters = scratch.take<T>(kPoints * filter_step);
    window = scratch.take<T>(window_elements<T>(tiling, c.channels));
  }

  static int64_t strip_vectors(int64_t columns) {
    const int64_t total = (columns + kLanes<T> - 1) / kLanes<T>;
    return total == 1 ? 1 : (total == 3 ? 3 : 2);
  }
};

template <class T>
void transform_filters(const Correlation<T>& c, const CorrelationPlan<T>& p) {
  constexpr int L = kLanes<T>;
  const int64_t strip = p.weights.strip, C = c.channels;
  p.weights.fill(c, 3, 3);
  for (int64_t n = 0; n < c.columns; n += strip)
    for (int64_t k = 0; k < C; ++k)
      for (int64_t j = 0; j < strip; j += L) {
        const T* src = p.weights.packed + n * p.weights.depth + k * strip + j;
        T* dst = p.filters + n * C + k * strip + j;
        Vec<T> g[3][3], t[4][4];
        METAFAST_UNROLL for (int a = 0; a < 3; ++a) METAFAST_UNROLL for (int b = 0; b < 3; ++b) g[a][b] =
            load(src + (3 * a + b) * C * strip);
        transform_filter<T>(g, t);
        METAFAST_UNROLL for (int a = 0; a < 4; ++a) METAFAST_UNROLL for (int b = 0; b < 4; ++b)
            store(dst + (4 * a + b) * p.filter_step, t[a][b]);
      }
}

// products[point] = inputs[point] × filters[point]
template <class T>
void multiply_points(const Correlation<T>& c, const CorrelationPlan<T>& p, int64_t tiles) {
  constexpr int L = kLanes<T>;
  const int64_t zero = 0, strip = p.weights.strip;
  TileCall<T> call{};
  call.a_rs = p.inputs.stride, call.a_cs = 1;
  call.segment = &zero, call.segments = 1, call.length = c.channels;
  call.b_rs = strip, call.c_rs = p.products.stride, call.last = L;
  for (int point = 0; point < kPoints; ++point)
    for (int64_t n = 0; n < c.columns; n += strip) {
      call.a = p.inputs.p + point * p.inputs.step;
      call.b = p.filters + point * p.filter_step + n * c.channels;
      call.c = p.products.p + point * p.products.step + n;
      run_strip<T>(call, tiles, (min64(strip, c.columns - n) + L - 1) / L);
    }
}

// One tile's 2×2 outputs, those of the first `rows` rows and `columns` columns.
template <class T>
METAFAST_INLINE void output_tile(const Correlation<T>& c, const T* src, int64_t step, T* out, int64_t rows,
                                 int64_t columns) {
  constexpr int L = kLanes<T>;
  for (int64_t n = 0; n < c.columns; n += L) {
    const Mask<T> mask(min64(L, c.columns - n));
    Vec<T> t[4][4], y[2][2];
    METAFAST_UNROLL for (int i = 0; i < 4; ++i) METAFAST_UNROLL for (int j = 0; j < 4; ++j) t[i][j] =
        load(src + (4 * i + j) * step + n);
    transform_output<T>(t, y);
    const Vec<T> bias = c.bias ? load(c.bias + n, mask) : Vec<T>{};
    METAFAST_UNROLL for (int i = 0; i < 2; ++i)
        METAFAST_UNROLL for (int j = 0; j < 2; ++j) if (i < rows && j < columns) {
      T* to = out + i * c.out_row + j * c.out_pixel + n;
      const Vec<T> value = c.bias ? y[i][j] + bias : y[i][j];
      store(to, c.add ? load(to, mask) + value : value, mask);
    }
  }
}

template <class T>
void output_block(const Correlation<T>& c, const CorrelationPlan<T>& p, const Block& b) {
  const T* src = p.products.p;
  for (int64_t n = b.image; n < b.image + b.images; ++n)
    for (int64_t i = b.row; i < b.row + b.rows; ++i)
      for (int64_t j = 0; j < p.tiling.across; ++j, src += p.products.stride)
        output_tile(c, src, p.products.step,
                    c.out + n * c.out_image + 2 * i * c.out_row + 2 * j * c.out_pixel, c.v.outputs - 2 * i,
                    c.h.outputs - 2 * j);
}

// Work of the direct form against the points' products with their transforms, in vector operations a tile.
bool pays(int64_t height, int64_t width, int64_t images, int64_t C, int64_t O) {
  if (C < 16 || O < 16) return false;
  const int64_t tiles = (height + 1) / 2 * ((width + 1) / 2);
  const int64_t direct = 9 * height * width * C * O, transforms = 60 * (C + O) * tiles;
  return images * tiles >= 96 && 10 * (16 * tiles * C * O + transforms) < 9 * direct;
}

template <class T>
struct DwPlan {
  Tiling tiling;
  Points<T> inputs, outputs;  // Bᵀ d B and A dy Aᵀ
  Points<T> sums;             // [points][C][O]
  T* window;

  DwPlan(const ConvInts& i, Carver& scratch)
      : tiling(Tiling::of<T>(i.N, i.OH, i.OW, kPoints * (i.C + i.O))),
        inputs(tiling.most_tiles(), i.C, scratch),
        outputs(tiling.most_tiles(), i.O, scratch),
        sums(i.C, i.O, scratch) {
    window = scratch.take<T>(window_elements<T>(tiling, i.C));
  }
};

template <class T>
void gradient_block(const ConvInts& i, const DwPlan<T>& p, const Block& b, const T* dy) {
  constexpr int L = kLanes<T>;
  T* dst = p.outputs.p;
  for (int64_t n = b.image; n < b.image + b.images; ++n)
    for (int64_t r = b.row; r < b.row + b.rows; ++r)
      for (int64_t s = 0; s < p.tiling.across; ++s, dst += p.outputs.stride) {
        const T* src = dy + ((n * i.OH + 2 * r) * i.OW + 2 * s) * i.O;
        const bool below = 2 * r + 1 < i.OH, beside = 2 * s + 1 < i.OW;
        for (int64_t o = 0; o < i.O; o += L) {
          const Mask<T> mask(min64(L, i.O - o));
          const Vec<T> zero{};
          const Vec<T> y[2][2] = {{load(src + o, mask), beside ? load(src + i.O + o, mask) : zero},
                                  {below ? load(src + i.OW * i.O + o, mask) : zero,
                                   below && beside ? load(src + (i.OW + 1) * i.O + o, mask) : zero}};
          Vec<T> t[4][4];
          transform_output_adjoint<T>(y, t);
          METAFAST_UNROLL for (int k = 0; k < kPoints; ++k)
              store(dst + k * p.outputs.step + o, t[k / 4][k % 4]);
        }
      }
}

// sums[point] (+)= inputs[point]ᵀ × outputs[point], rows `channels`.
template <class T>
void add_points(const ConvInts& i, const DwPlan<T>& p, int64_t tiles, Range channels, bool add) {
  constexpr int L = kLanes<T>;
  const int64_t zero = 0, vectors = CorrelationPlan<T>::strip_vectors(i.O), strip = vectors * L;
  TileCall<T> call{};
  call.a_rs = 1, call.a_cs = p.inputs.stride;
  call.segment = &zero, call.segments = 1, call.length = tiles;
  call.b_rs = p.outputs.stride, call.c_rs = p.sums.stride, call.last = L, call.add = add;
  for (int point = 0; point < kPoints; ++point)
    for (int64_t o = 0; o < i.O; o += strip) {
      call.a = p.inputs.p + point * p.inputs.step + channels.begin;
      call.b = p.outputs.p + point * p.outputs.step + o;
      call.c = p.sums.p + point * p.sums.step + channels.begin * p.sums.stride + o;
      run_strip<T>(call, channels.end - channels.begin, (min64(strip, i.O - o) + L - 1) / L);
    }
}

template <class T>
void write_gradient(const ConvInts& i, const DwPlan<T>& p, Range channels, T* dw) {
  constexpr int L = kLanes<T>;
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    T taps[9][L];
    for (int64_t o = 0; o < i.O; o += L) {
      const int64_t n = min64(L, i.O - o);
      const T* src = p.sums.p + c * p.sums.stride + o;
      Vec<T> t[4][4], g[3][3];
      METAFAST_UNROLL for (int k = 0; k < kPoints; ++k) t[k / 4][k % 4] = load(src + k * p.sums.step);
      transform_filter_adjoint<T>(t, g);
      for (int tap = 0; tap < 9; ++tap) {
        T* to = dw + c * i.w_sc + o * i.w_so + tap / 3 * i.w_skh + tap % 3 * i.w_skw;
        const Vec<T> value = g[tap / 3][tap % 3];
        if (i.w_so == 1) {
          const Mask<T> mask(n);
          store(to, i.mode ? load(to, mask) + value : value, mask);
          continue;
        }
        store(taps[tap], value);
        for (int64_t j = 0; j < n; ++j)
          to[j * i.w_so] = i.mode ? to[j * i.w_so] + taps[tap][j] : taps[tap][j];
      }
    }
  }
}

}  // namespace

template <class T>
bool winograd_suits(const Correlation<T>& c) noexcept {
  const bool form = c.v.taps == 3 && c.h.taps == 3 && c.v.step == 1 && c.h.step == 1 &&
                    c.v.offset_step == 1 && c.h.offset_step == 1;
  return sizeof(T) == 4 && form && pays(c.v.outputs, c.h.outputs, c.images, c.channels, c.columns);
}

template <class T>
bool winograd_dw_suits(const ConvInts& i) noexcept {
  const bool form = i.KH == 3 && i.KW == 3 && i.sh == 1 && i.sw == 1 && i.dh == 1 && i.dw == 1;
  return sizeof(T) == 4 && form && pays(i.OH, i.OW, i.N, i.C, i.O);
}

template <class T>
int winograd_correlate(const Correlation<T>& c, const Args& a) noexcept {
  Carver scratch(a.scratch);
  const CorrelationPlan<T> p(c, scratch);
  const Source<T> source{c.source, c.height, c.width, c.channels, c.v.low, c.h.low};
  transform_filters(c, p);
  const Range mine = share(p.tiling.blocks(), a.part, a.parts);
  for (int64_t k = mine.begin; k < mine.end; ++k) {
    const Block b = Block::at(p.tiling, k);
    input_block(source, p.tiling, b, p.inputs, p.window, {0, c.channels});
    multiply_points(c, p, b.tiles(p.tiling));
    output_block(c, p, b);
  }
  return kOk;
}

template <class T>
int winograd_dw(const ConvInts& i, const Args& a) noexcept {
  Carver scratch(a.scratch);
  const DwPlan<T> p(i, scratch);
  const Source<T> source{static_cast<const T*>(a.ptr[0]), i.H, i.W, i.C, -i.ph, -i.pw};
  const Range channels = share(i.C, a.part, a.parts, kLanes<T>);
  if (channels.begin == channels.end) return kOk;
  for (int64_t k = 0; k < p.tiling.blocks(); ++k) {
    const Block b = Block::at(p.tiling, k);
    input_block(source, p.tiling, b, p.inputs, p.window, channels);
    gradient_block(i, p, b, static_cast<const T*>(a.ptr[1]));
    add_points(i, p, b.tiles(p.tiling), channels, k > 0);
  }
  write_gradient(i, p, channels, static_cast<T*>(a.ptr[2]));
  return kOk;
}

template <class T>
int64_t winograd_correlate_scratch(const Correlation<T>& c) noexcept {
  Carver counter(nullptr);
  CorrelationPlan<T>(c, counter);
  return counter.used();
}

template <class T>
int64_t winograd_dw_scratch(const ConvInts& i) noexcept {
  Carver counter(nullptr);
  DwPlan<T>(i, counter);
  return counter.used();
}

#define METAFAST_INSTANTIATE(T)                                                 \
  template bool winograd_suits(const Correlation<T>&) noexcept;                 \
  template bool winograd_dw_suits<T>(const ConvInts&) noexcept;                 \
  template int winograd_correlate(const Correlation<T>&, const Args&) noexcept; \
  template int winograd_dw<T>(const ConvInts&, const Args&) noexcept;           \
  template int64_t winograd_correlate_scratch(const Correlation<T>&) noexcept;  \
  template int64_t winograd_dw_scratch<T>(const ConvInts&) noexcept;
METAFAST_INSTANTIATE(float)
METAFAST_INSTANTIATE(double)

}  // namespace metafast::kernels::METAFAST_ISA
