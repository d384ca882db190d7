// What the three convolutions share: the call's integers by name, and the copy of an image's rows with zeros
// around it.
#pragma once
#include "vec.hpp"

namespace metafast::kernels::METAFAST_ISA {

struct ConvInts {
  int64_t N, H, W, C, O, KH, KW, sh, sw, ph, pw, dh, dw, OH, OW, w_so, w_sc, w_skh, w_skw, mode, winograd,
      has_bias;
  int64_t pieces() const { return max64(1, has_bias); }  // of conv_dw, in the place of the flag
  int64_t weights() const { return O * C * KH * KW; }
  static const ConvInts& of(const int64_t* i) { return *reinterpret_cast<const ConvInts*>(i); }
};

// Calls f(piece, share of n, share of rows) for what a part does of conv_dw: `rows` that add up are cut into the pieces,
// and each of these into shares of n things that are computed apart, in units.
template <class F>
METAFAST_INLINE void each_piece(const ConvInts& i, int64_t rows, int64_t n, int64_t unit, const Args& a,
                                F f) {
  const int64_t pieces = i.pieces(), units = (n + unit - 1) / unit;
  const Range mine = share(pieces * units, a.part, a.parts);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t begin = max64(mine.begin - piece * units, 0), end = min64(mine.end - piece * units, units);
    if (begin < end)
      f(piece, Range{begin * unit, min64(end * unit, n)},
        share(rows, static_cast<int>(piece), static_cast<int>(pieces)));
  }
}

// Rows [top, top + rows) and columns [left, left + columns) of one image (height, width, channels); whatever
// lies outside the image is zero.
struct Window {
  int64_t top, left, rows, columns;
  bool inside(int64_t height, int64_t width) const {
    return top >= 0 && left >= 0 && top + rows <= height && left + columns <= width;
  }
};

template <class T>
METAFAST_INLINE void copy_run(T* dst, const T* src, int64_t n) {
  constexpr int L = kLanes<T>;
  int64_t k = 0;
  for (; k + L <= n; k += L) store(dst + k, load(src + k));
  if (k < n) store(dst + k, load(src + k, Mask<T>(n - k)), Mask<T>(n - k));
}

template <class T>
METAFAST_INLINE void zero_run(T* dst, int64_t n) {
  if (n > 0) __builtin_memset(dst, 0, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
void copy_window(T* dst, const T* image, int64_t height, int64_t width, int64_t channels, const Window& w) {
  const int64_t line = w.columns * channels;
  const int64_t before = max64(0, min64(w.columns, -w.left));
  const int64_t from = max64(0, w.left);
  const int64_t present = max64(0, min64(width, w.left + w.columns) - from);
  for (int64_t r = w.top; r < w.top + w.rows; ++r, dst += line) {
    if (r < 0 || r >= height || present == 0) {
      zero_run(dst, line);
      continue;
    }
    zero_run(dst, before * channels);
    copy_run(dst + before * channels, image + (r * width + from) * channels, present * channels);
    zero_run(dst + (before + present) * channels, line - (before + present) * channels);
  }
}

// Hands out aligned pieces of the scratch; with a null base it only counts them.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base_ ? base_ + used_ : nullptr);
    used_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

}  // namespace metafast::kernels::METAFAST_ISA
