// Forward and backward-data are one thing: a correlation of a channels-last source with taps at given
// offsets. The forward pass correlates x; backward-data correlates dy, once for each residue of the output
// position modulo the stride, with those taps that meet it. Rows of the source are copied with their zeros
// into scratch, so that a run of taps and channels lies together and the register tile reads pixels in place,
// without a patch matrix.
#include "conv.hpp"

#include "ahead.hpp"
#include "conv_correlation.hpp"
#include "tile.hpp"
#include "winograd.hpp"
#include "winograd_down.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

constexpr int64_t kWindowBytes = 131072;

template <class T>
struct Plan {
  PackedWeights<T> weights;
  int64_t rows;  // output rows a window serves
  int64_t window_elements;
  T* window;
  int64_t* segments;

  Plan(const Correlation<T>& c, int64_t all_taps, Carver& scratch)
      : weights(c, strip_vectors(c) * kLanes<T>, all_taps, scratch) {
    const int64_t line = window_columns(c) * c.channels * static_cast<int64_t>(sizeof(T));
    rows = max64(1, min64(c.v.outputs, (kWindowBytes / max64(line, 1) - c.v.span()) / c.v.step + 1));
    window_elements = window_rows(c, rows) * window_columns(c) * c.channels;
    window = scratch.take<T>(window_elements);
    segments = scratch.take<int64_t>(all_taps);
  }

  static int64_t strip_vectors(const Correlation<T>& c) {
    const int64_t total = (c.columns + kLanes<T> - 1) / kLanes<T>;
    return total == 1 ? 1 : (total == 3 ? 3 : (c.h.outputs <= max_tile_rows(4) && total >= 4 ? 4 : 2));
  }

  static int64_t window_rows(const Correlation<T>& c, int64_t rows) {
    return (rows - 1) * c.v.step + c.v.span();
  }
  static int64_t window_columns(const Correlation<T>& c) { return (c.h.outputs - 1) * c.h.step + c.h.span(); }
};

// Offsets of the runs that the tile reads for one pixel, in a source of the given line length; returns their
// number.
template <class T>
int64_t find_segments(const Correlation<T>& c, const Plan<T>& plan, int64_t line) {
  const bool together = c.h.together();
  int64_t count = 0;
  for (int64_t a = 0; a < c.v.taps; ++a)
    for (int64_t b = 0; b < (together ? 1 : c.h.taps); ++b)
      plan.segments[count++] = a * c.v.offset_step * line + b * c.h.offset_step * c.channels;
  return count;
}

// Output rows [first, first + rows) of one image, from the source as the tile reads it.
template <class T>
void run_rows(const Correlation<T>& c, const Plan<T>& plan, const T* source, int64_t line, T* out,
              int64_t rows) {
  constexpr int L = kLanes<T>;
  TileCall<T> call{};
  call.a_rs = c.h.step * c.channels, call.a_cs = 1;
  call.segment = plan.segments, call.segments = find_segments(c, plan, line);
  call.length = c.h.together() ? c.h.taps * c.channels : c.channels;
  call.b_rs = plan.weights.strip, call.c_rs = c.out_pixel, call.add = c.add;
  const int64_t pixel = c.out_pixel * static_cast<int64_t>(sizeof(T));
  const int64_t ahead =
      c.images * c.v.outputs * c.h.outputs * pixel < kLargeBytes ? 0 : kAheadBytes / pixel + 1;
  int64_t pixels = c.h.outputs;
  if (c.v.step * line == pixels * call.a_rs && c.out_row == pixels * c.out_pixel) pixels *= rows, rows = 1;
  for (int64_t n = 0; n < c.columns; n += plan.weights.strip) {
    const int64_t columns = min64(plan.weights.strip, c.columns - n), vectors = (columns + L - 1) / L;
    call.last = columns - (vectors - 1) * L;
    call.b = plan.weights.packed + n * plan.weights.depth;
    call.bias = c.bias ? c.bias + n : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      call.a = source + r * c.v.step * line, call.c = out + r * c.out_row + n;
      run_strip<T>(call, pixels, vectors, ahead);
    }
  }
}

template <class T>
void correlate(const Correlation<T>& c, const Plan<T>& plan, int part, int parts) {
  const Range mine = share(c.images * c.v.outputs, part, parts);
  for (int64_t at = mine.begin; at < mine.end;) {
    const int64_t image = at / c.v.outputs, first = at % c.v.outputs;
    const int64_t rows = min64(min64(plan.rows, c.v.outputs - first), mine.end - at);
    const Window window{first * c.v.step + c.v.low, c.h.low, plan.window_rows(c, rows),
                        plan.window_columns(c)};
    const T* picture = c.source + image * c.height * c.width * c.channels;
    T* out = c.out + image * c.out_image + first * c.out_row;
    if (window.inside(c.height, c.width)) {
      run_rows(c, plan, picture + (window.top * c.width + window.left) * c.channels, c.width * c.channels,
               out, rows);
    } else {
      copy_window(plan.window, picture, c.height, c.width, c.channels, window);
      run_rows(c, plan, plan.window, window.columns * c.channels, out, rows);
    }
    at += rows;
  }
}

Axis forward_axis(int64_t outputs, int64_t stride, int64_t pad, int64_t dilation, int64_t taps) {
  return {outputs, stride, taps, -pad, dilation, 0, 1};
}

// Input positions residue, residue + stride, ... and the taps that meet them, those for which residue + pad -
// tap * dilation is a multiple of the stride: every period-th one, taken from the last to the first.
Axis adjoint_axis(int64_t inputs, int64_t residue, int64_t stride, int64_t pad, int64_t dilation,
                  int64_t taps) {
  int64_t period = 1, last = taps - 1;
  while (period * dilation % stride != 0) ++period;
  while (last >= 0 && last > taps - 1 - period && (residue + pad - last * dilation) % stride != 0) --last;
  const int64_t met = last < 0 || last == taps - 1 - period ? 0 : last / period + 1;
  return {(inputs - residue + stride - 1) / stride,
          1,
          met,
          (residue + pad - last * dilation) / stride,
          period * dilation / stride,
          last,
          -period};
}

template <class T>
Correlation<T> forward(const ConvInts& i, void* const* ptr) {
  Correlation<T> c{};
  c.images = i.N, c.height = i.H, c.width = i.W, c.channels = i.C;
  c.columns = i.O, c.out_pixel = i.O, c.out_row = i.OW * i.O, c.out_image = i.OH * i.OW * i.O;
  c.w_column = i.w_so, c.w_channel = i.w_sc, c.w_row_tap = i.w_skh, c.w_column_tap = i.w_skw;
  c.add = i.mode != 0, c.transformed = i.winograd == 2;
  c.v = forward_axis(i.OH, i.sh, i.ph, i.dh, i.KH);
  c.h = forward_axis(i.OW, i.sw, i.pw, i.dw, i.KW);
  if (ptr) {
    c.source = static_cast<const T*>(ptr[0]), c.w = static_cast<const T*>(ptr[1]),
    c.out = static_cast<T*>(ptr[2]);
    c.bias = i.has_bias ? static_cast<const T*>(ptr[3]) : nullptr;
  }
  return c;
}

template <class T>
Correlation<T> adjoint(const ConvInts& i, void* const* ptr, int64_t down, int64_t across) {
  Correlation<T> c{};
  c.images = i.N, c.height = i.OH, c.width = i.OW, c.channels = i.O;
  c.columns = i.C, c.out_pixel = i.sw * i.C, c.out_row = i.sh * i.W * i.C, c.out_image = i.H * i.W * i.C;
  c.w_column = i.w_sc, c.w_channel = i.w_so, c.w_row_tap = i.w_skh, c.w_column_tap = i.w_skw;
  c.add = i.mode != 0, c.transformed = i.winograd == 2;
  c.v = adjoint_axis(i.H, down, i.sh, i.ph, i.dh, i.KH);
  c.h = adjoint_axis(i.W, across, i.sw, i.pw, i.dw, i.KW);
  if (ptr) {
    c.source = static_cast<const T*>(ptr[0]), c.w = static_cast<const T*>(ptr[1]);
    c.out = static_cast<T*>(ptr[2]) + (down * i.W + across) * i.C;
  }
  return c;
}

// Winograd's forms read the weights as 3 x 3 taps: of a stride's residues each meets every other one, of 5 x 5 3 x 3.
bool may_be_winograds(const ConvInts& i) { return i.winograd && i.sh == 1 && i.sw == 1; }

bool by_winograd(const ConvInts& i, const Correlation<float>& c) {
  return i.winograd == 2 || (may_be_winograds(i) && winograd_suits(c));
}

// Positions no tap meets: nothing is added, or zero assigned.
template <class T>
void clear_unmet(const Correlation<T>& c, int part, int parts) {
  if (c.add) return;
  const Range mine = share(c.images * c.v.outputs, part, parts);
  for (int64_t at = mine.begin; at < mine.end; ++at) {
    T* row = c.out + at / c.v.outputs * c.out_image + at % c.v.outputs * c.out_row;
    for (int64_t p = 0; p < c.h.outputs; ++p) zero_run(row + p * c.out_pixel, c.columns);
  }
}

// By the form that suits it.
template <class T>
int correlate(const Correlation<T>& c, const ConvInts& i, const Args& a) {
  if constexpr (sizeof(T) == 4) {
    if (by_winograd(i, c)) return winograd_correlate(c, a);
    if (may_be_winograds(i) && winograd_down_suits(c)) return winograd_down_correlate(c, a);
  }
  Carver scratch(a.scratch);
  const Plan<T> plan(c, i.KH * i.KW, scratch);
  plan.weights.fill(c, i.KH, i.KW);
  correlate(c, plan, a.part, a.parts);
  return kOk;
}

template <class T>
int64_t correlate_scratch(const Correlation<T>& c, const ConvInts& i) {
  if constexpr (sizeof(T) == 4) {
    if (by_winograd(i, c)) return winograd_correlate_scratch(c);
    if (may_be_winograds(i) && winograd_down_suits(c)) return winograd_down_correlate_scratch(c);
  }
  Carver counter(nullptr);
  Plan<T>(c, i.KH * i.KW, counter);
  return counter.used();
}

}  // namespace

template <class T>
int conv_fwd(const Args& a) noexcept {
  const ConvInts& i = ConvInts::of(a.i);
  if (i.N * i.OH * i.OW * i.O == 0) return kOk;
  return correlate(forward<T>(i, a.ptr), i, a);
}

template <class T>
int64_t conv_fwd_scratch(const int64_t* ints) noexcept {
  const ConvInts& i = ConvInts::of(ints);
  return correlate_scratch(forward<T>(i, nullptr), i);
}

template <class T>
int conv_dx(const Args& a) noexcept {
  const ConvInts& i = ConvInts::of(a.i);
  if (i.N * i.H * i.W * i.C == 0) return kOk;
  for (int64_t down = 0; down < min64(i.sh, i.H); ++down)
    for (int64_t across = 0; across < min64(i.sw, i.W); ++across) {
      const Correlation<T> c = adjoint<T>(i, a.ptr, down, across);
      if (c.v.taps * c.h.taps == 0 || i.OH * i.OW * i.O == 0)
        clear_unmet(c, a.part, a.parts);
      else
        correlate(c, i, a);
    }
  return kOk;
}

template <class T>
int64_t conv_dx_scratch(const int64_t* ints) noexcept {
  const ConvInts& i = ConvInts::of(ints);
  int64_t most = 0;
  for (int64_t down = 0; down < min64(i.sh, i.H); ++down)
    for (int64_t across = 0; across < min64(i.sw, i.W); ++across) {
      const Correlation<T> c = adjoint<T>(i, nullptr, down, across);
      if (c.v.taps * c.h.taps != 0) most = max64(most, correlate_scratch(c, i));
    }
  return most;
}

// What `filters` of the ints say, of the weights at ptr[0].
template <class T>
Correlation<T> filters_of(const int64_t* ints, void* const* ptr) {
  const ConvInts& i = ConvInts::of(ints);
  Correlation<T> c = ints[22] ? adjoint<T>(i, nullptr, 0, 0) : forward<T>(i, nullptr);
  if (ptr) c.w = static_cast<const T*>(ptr[0]);
  return c;
}

template <class T>
int winograd_filters(const Args& a) noexcept {
  if constexpr (sizeof(T) == 4)
    return winograd_transform(filters_of<T>(a.i, a.ptr), static_cast<T*>(a.ptr[1]), a);
  return kOk;
}

template <class T>
int64_t winograd_filters_scratch(const int64_t* ints) noexcept {
  if constexpr (sizeof(T) == 4) return winograd_transform_scratch(filters_of<T>(ints, nullptr));
  return 0;
}

#define METAFAST_INSTANTIATE(name)                                 \
  template int name<float>(const Args&) noexcept;                  \
  template int name<double>(const Args&) noexcept;                 \
  template int64_t name##_scratch<float>(const int64_t*) noexcept; \
  template int64_t name##_scratch<double>(const int64_t*) noexcept;
METAFAST_INSTANTIATE(conv_fwd)
METAFAST_INSTANTIATE(conv_dx)
METAFAST_INSTANTIATE(winograd_filters)

}  // namespace metafast::kernels::METAFAST_ISA
