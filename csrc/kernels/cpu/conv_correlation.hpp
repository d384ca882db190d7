// A correlation of channels-last images with taps at given offsets: what the forward convolution and its
// gradient in x both are (conv.cpp), and its weights in the order the register tile reads.
#pragma once
#include "conv_window.hpp"
#include "pack.hpp"

namespace metafast::kernels::METAFAST_ISA {

// Along one axis: output position i reads source position i * step + offset(t) for its tap t of weight
// index(t).
struct Axis {
  int64_t outputs, step, taps;
  int64_t low, offset_step;  // offset_step > 0: offsets ascend
  int64_t first_index, index_step;
  int64_t offset(int64_t t) const { return low + t * offset_step; }
  int64_t index(int64_t t) const { return first_index + t * index_step; }
  int64_t span() const { return (taps - 1) * offset_step + 1; }
  bool together() const { return span() == taps; }
};

template <class T>
struct Correlation {
  const T* source;  // (images, height, width, channels)
  int64_t images, height, width, channels;
  T* out;  // columns together
  int64_t out_image, out_row, out_pixel, columns;
  const T* w;
  bool transformed;  // w is what winograd_filters made
  int64_t w_column, w_channel, w_row_tap, w_column_tap;
  const T* bias;
  bool add;
  Axis v, h;  // down and across
};

// What Winograd's forms are of: 3 x 3 taps, side by side.
template <class T>
bool is_three_by_three(const Correlation<T>& c) {
  return c.v.taps == 3 && c.h.taps == 3 && c.v.step == 1 && c.h.step == 1 && c.v.offset_step == 1 &&
         c.h.offset_step == 1;
}

inline bool is_three_by_three(const ConvInts& i) {
  return i.KH == 3 && i.KW == 3 && i.sh == 1 && i.sw == 1 && i.dh == 1 && i.dw == 1;
}

// Strips of `strip` columns; in a strip rows in the order (vertical tap, horizontal tap, channel).
template <class T>
struct PackedWeights {
  int64_t strip, depth;  // depth: taps that take part × channels
  T *packed, *unused;    // unused: where rows of the other taps go
  int64_t* slots;        // of every tap its place in the order, or -1

  PackedWeights(const Correlation<T>& c, int64_t strip_columns, int64_t all_taps, Carver& scratch)
      : strip(strip_columns), depth(c.v.taps * c.h.taps * c.channels) {
    packed = scratch.take<T>(round_up(c.columns, strip) * depth);
    unused = scratch.take<T>(strip);
    slots = scratch.take<int64_t>(all_taps);
  }

  void fill(const Correlation<T>& c, int64_t KH, int64_t KW) const { fill(c, KH, KW, {0, c.columns}); }

  // Columns [some.begin, some.end), which begin a strip.
  void fill(const Correlation<T>& c, int64_t KH, int64_t KW, Range some) const {
    const int64_t taps = KH * KW;
    for (int64_t t = 0; t < taps; ++t) slots[t] = -1;
    for (int64_t a = 0; a < c.v.taps; ++a)
      for (int64_t b = 0; b < c.h.taps; ++b) slots[c.v.index(a) * KW + c.h.index(b)] = a * c.h.taps + b;
    for (int64_t n = some.begin; n < some.end; n += strip) fill_strip(c, n, taps, KW);
  }

 private:
  void fill_strip(const Correlation<T>& c, int64_t n, int64_t taps, int64_t KW) const {
    const int64_t C = c.channels, columns = min64(strip, c.columns - n);
    const bool taps_together = c.w_column_tap == 1 && c.w_row_tap == KW && taps > 1;
    const bool channels_then_taps = taps_together && c.w_channel == taps && c.w_column != 1;
    const bool columns_then_taps = taps_together && c.w_column == taps && c.w_channel != 1;
    T* base = packed + n * depth;
    const T* w = c.w + n * c.w_column;
    auto place = [&](int64_t tap, int64_t channel) {
      const int64_t slot = slots[tap];
      return slot < 0 ? unused : base + (slot * C + channel) * strip;
    };
    if (channels_then_taps) {
      pack_rows<T>(w, 1, c.w_column, C * taps, columns, strip,
                   [&](int64_t k) { return place(k % taps, k / taps); });
    } else if (columns_then_taps) {
      for (int64_t k = 0; k < C; ++k)
        pack_rows<T>(w + k * c.w_channel, 1, taps, taps, columns, strip,
                     [&](int64_t tap) { return place(tap, k); });
    } else {
      for (int64_t tap = 0; tap < taps; ++tap)
        if (slots[tap] >= 0)
          pack_rows<T>(w + tap / KW * c.w_row_tap + tap % KW * c.w_column_tap, c.w_channel, c.w_column, C,
                       columns, strip, [&](int64_t k) { return place(tap, k); });
    }
  }
};

}  // namespace metafast::kernels::METAFAST_ISA
