#include "pool.hpp"

#include "ahead.hpp"
#include "sums.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

// The part of a window that lies inside 0..size: positions begin, begin + dilation, ... < end.
struct Taps {
  int64_t begin, end;
  static Taps of(int64_t output, int64_t stride, int64_t pad, int64_t dilation, int64_t taps, int64_t size) {
    const int64_t start = output * stride - pad;
    const int64_t skipped = start < 0 ? (-start + dilation - 1) / dilation : 0;
    return {start + skipped * dilation, min64(size, start + (taps - 1) * dilation + 1)};
  }
};

template <class T>
METAFAST_INLINE void store_indices(int32_t* p, Bits<T> v, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    const Vec<float> as_float = from_bits<float>(v);
    n == kLanes<T> ? __builtin_memcpy(p, &v, sizeof v)
                   : (store(reinterpret_cast<float*>(p), as_float, Mask<float>(n)), nullptr);
  } else {
    for (int j = 0; j < kLanes<T>; ++j)
      if (j < n) p[j] = static_cast<int32_t>(v[j]);
  }
}

template <class T>
METAFAST_INLINE Bits<T> load_indices(const int32_t* p, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    return bits_of<float>(n == kLanes<T> ? load(reinterpret_cast<const float*>(p))
                                         : load(reinterpret_cast<const float*>(p), Mask<float>(n)));
  } else {
    Bits<T> v{};
    for (int j = 0; j < kLanes<T>; ++j)
      if (j < n) v[j] = p[j];
    return v;
  }
}

template <class T>
METAFAST_INLINE bool any_lane(Bits<T> m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(m), reinterpret_cast<__m512i>(m)) != 0;
  else
    return _mm512_test_epi64_mask(reinterpret_cast<__m512i>(m), reinterpret_cast<__m512i>(m)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(m), reinterpret_cast<__m256i>(m));
#else
  auto any = m[0];
  for (int j = 1; j < kLanes<T>; ++j) any |= m[j];
  return any != 0;
#endif
}

template <class T>
METAFAST_INLINE Bits<T> iota() {
  Bits<T> v;
  for (int j = 0; j < kLanes<T>; ++j) v[j] = j;
  return v;
}

template <class T>
METAFAST_INLINE Bits<T> splat_index(int64_t n) {
  return static_cast<decltype(Bits<T>{}[0] + 0)>(n) - Bits<T>{};
}

// Winners of windows that look like 2 x 2 ones at stride 2: whether they are is seen from the indices.
struct Halved {
  int64_t H, W, C, OH, OW;
  bool likely() const { return OH > 0 && OW > 0 && H / 2 == OH && W / 2 == OW; }
  int64_t corner(int64_t oh, int64_t ow) const { return 2 * oh * W + 2 * ow; }
};

// dx = dy at the winners of one image and 0 elsewhere, every element written once. False where a winner lies
// outside its window: dx is then not what it should be.
template <class T>
bool scatter_halved(const Halved& s, const T* dy, const int32_t* idx, T* dx) {
  constexpr int L = kLanes<T>;
  const Vec<T> zero{};
  Bits<T> outside{};
  for (int64_t oh = 0; oh < s.OH; ++oh) {
    for (int64_t ow = 0; ow < s.OW; ++ow, dy += s.C, idx += s.C) {
      const int64_t corner = s.corner(oh, ow);
      for (int64_t c = 0; c < s.C; c += L) {
        const int64_t n = min64(L, s.C - c);
        const Mask<T> mask(n);
        fetch_ahead(dy + c), fetch_ahead(idx + c);
        const Vec<T> v = zero + (n == L ? load(dy + c) : load(dy + c, mask));
        const Bits<T> winner = load_indices<T>(idx + c, n);
        Bits<T> met = splat_index<T>(n) <= iota<T>();  // lanes beyond C
        METAFAST_UNROLL for (int tap = 0; tap < 4; ++tap) {
          const int64_t at = corner + tap / 2 * s.W + tap % 2;
          const Bits<T> here = winner == splat_index<T>(at);
          const Vec<T> x = here ? v : zero;
          met |= here;
          if (n == L)
            store(dx + at * s.C + c, x);
          else
            store(dx + at * s.C + c, x, mask);
        }
        outside |= ~met;
      }
    }
    T* row = dx + 2 * oh * s.W * s.C;
    if (s.W % 2)
      for (int64_t c = 0; c < s.C; ++c) row[(s.W - 1) * s.C + c] = 0, row[(2 * s.W - 1) * s.C + c] = 0;
  }
  if (s.H % 2) __builtin_memset(dx + (s.H - 1) * s.W * s.C, 0, static_cast<size_t>(s.W * s.C) * sizeof(T));
  return !any_lane<T>(outside);
}

// y = x at the winners of one image; as above.
template <class T>
bool gather_halved(const Halved& s, const T* x, const int32_t* idx, T* y, int64_t oh) {
  constexpr int L = kLanes<T>;
  Bits<T> outside{};
  for (int64_t ow = 0; ow < s.OW; ++ow, y += s.C, idx += s.C) {
    const int64_t corner = s.corner(oh, ow);
    for (int64_t c = 0; c < s.C; c += L) {
      const int64_t n = min64(L, s.C - c);
      const Mask<T> mask(n);
      const Bits<T> winner = load_indices<T>(idx + c, n);
      Bits<T> met = splat_index<T>(n) <= iota<T>();
      Vec<T> v{};
      METAFAST_UNROLL for (int tap = 0; tap < 4; ++tap) {
        const int64_t at = corner + tap / 2 * s.W + tap % 2;
        const T* p = x + at * s.C + c;
        fetch_ahead(p);
        const Bits<T> here = winner == splat_index<T>(at);
        v = here ? (n == L ? load(p) : load(p, mask)) : v;
        met |= here;
      }
      outside |= ~met;
      if (n == L)
        store(y + c, v);
      else
        store(y + c, v, mask);
    }
  }
  return !any_lane<T>(outside);
}

// The winner of one window for a vector of channels so far; where there is a sign, of sign * x.
template <class T, bool has_sign>
struct Winner {
  Vec<T> best = splat(static_cast<T>(-__builtin_inf())), x{}, sign{};
  Bits<T> place;

  METAFAST_INLINE void meet(Vec<T> v, int64_t at) {
    const Vec<T> key = has_sign ? v * sign : v;
    const Bits<T> wins = (key > best) | (key != key);
    best = wins ? key : best;
    if constexpr (has_sign) x = wins ? v : x;
    place = wins ? splat_index<T>(at) : place;
  }
  METAFAST_INLINE Vec<T> value() const { return has_sign ? x : best; }
};

// One row of windows, all of them inside the image and without dilation.
template <class T, int KH, int KW, bool has_sign>
void max_row(const T* x, const T* sign, int64_t W, int64_t C, int64_t sw, int64_t OW, int64_t h, T* y,
             int32_t* idx) {
  constexpr int L = kLanes<T>;
  for (int64_t ow = 0; ow < OW; ++ow, y += C, idx += C) {
    const int64_t first = h * W + ow * sw;
    for (int64_t c = 0; c < C; c += L) {
      const int64_t n = min64(L, C - c);
      const Mask<T> mask(n);
      fetch_ahead(y + c), fetch_ahead(idx + c);
      Winner<T, has_sign> winner;
      winner.place = splat_index<T>(first);
      if constexpr (has_sign) winner.sign = load(sign + c, mask), winner.x = load(x + first * C + c, mask);
      METAFAST_UNROLL for (int tap = 0; tap < KH * KW; ++tap) {
        const int64_t at = first + tap / KW * W + tap % KW;
        const T* p = x + at * C + c;
        fetch_ahead(p);
        winner.meet(n == L ? load(p) : load(p, mask), at);
      }
      if (n == L)
        store(y + c, winner.value());
      else
        store(y + c, winner.value(), mask);
      store_indices<T>(idx + c, winner.place, n);
    }
  }
}

}  // namespace

template <class T, bool has_sign>
METAFAST_INLINE void max_windows(const Args& a) {
  constexpr int L = kLanes<T>;
  const int64_t* i = a.i;
  const int64_t N = i[0], H = i[1], W = i[2], C = i[3], KH = i[4], KW = i[5], sh = i[6], sw = i[7], ph = i[8],
                pw = i[9], dh = i[10], dw = i[11], OH = i[12], OW = i[13];
  const T *x = static_cast<const T*>(a.ptr[0]), *sign = has_sign ? static_cast<const T*>(a.ptr[3]) : nullptr;
  T* y = static_cast<T*>(a.ptr[1]);
  int32_t* idx = static_cast<int32_t*>(a.ptr[2]);
  const Range mine = share(N * OH, a.part, a.parts);
  const bool inside = ph == 0 && pw == 0 && (OH - 1) * sh + KH <= H && (OW - 1) * sw + KW <= W;
  const bool two_by_two = KH == 2 && KW == 2 && dh == 1 && dw == 1 && inside;
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    const T* image = x + row / OH * H * W * C;
    if (two_by_two) {
      max_row<T, 2, 2, has_sign>(image, sign, W, C, sw, OW, row % OH * sh, y + row * OW * C,
                                 idx + row * OW * C);
      continue;
    }
    const Taps down = Taps::of(row % OH, sh, ph, dh, KH, H);
    for (int64_t ow = 0; ow < OW; ++ow) {
      const Taps across = Taps::of(ow, sw, pw, dw, KW, W);
      const int64_t out = (row * OW + ow) * C, first = down.begin * W + across.begin;
      for (int64_t c = 0; c < C; c += L) {
        const Mask<T> mask(min64(L, C - c));
        Winner<T, has_sign> winner;
        winner.place = splat_index<T>(first);
        if constexpr (has_sign) winner.sign = load(sign + c, mask);
        if (has_sign && down.begin < down.end && across.begin < across.end)
          winner.x = load(image + first * C + c, mask);
        for (int64_t h = down.begin; h < down.end; h += dh)
          for (int64_t w = across.begin; w < across.end; w += dw)
            winner.meet(load(image + (h * W + w) * C + c, mask), h * W + w);
        store(y + out + c, winner.value(), mask);
        store_indices<T>(idx + out + c, winner.place, min64(L, C - c));
      }
    }
  }
}

template <class T>
int max_pool(const Args& a) noexcept {
  a.i[14] ? max_windows<T, true>(a) : max_windows<T, false>(a);
  return kOk;
}

template <class T>
int pool_gather(const Args& a) noexcept {
  const int64_t N = a.i[0], HW = a.i[1] * a.i[2], C = a.i[3];
  const T* x = static_cast<const T*>(a.ptr[0]);
  const int32_t* idx = static_cast<const int32_t*>(a.ptr[1]);
  T* y = static_cast<T*>(a.ptr[2]);
  const Halved halved{a.i[1], a.i[2], C, a.i[4], a.i[5]};
  const int64_t OH = halved.OH, OW = halved.OW;
  bool looks_halved = halved.likely();
  const Range mine = share(N * OH, a.part, a.parts);
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    const T* image = x + row / OH * HW * C;
    const int64_t first = row * OW;
    if (looks_halved) {
      looks_halved = gather_halved(halved, image, idx + first * C, y + first * C, row % OH);
      if (looks_halved) continue;
    }
    for (int64_t k = first; k < first + OW; ++k)
      for (int64_t c = 0; c < C; ++c) y[k * C + c] = image[idx[k * C + c] * C + c];
  }
  return kOk;
}

template <class T>
int pool_scatter(const Args& a) noexcept {
  const int64_t N = a.i[0], HW = a.i[1] * a.i[2], C = a.i[3], P = a.i[4] * a.i[5];
  const T* dy = static_cast<const T*>(a.ptr[0]);
  const int32_t* idx = static_cast<const int32_t*>(a.ptr[1]);
  T* dx = static_cast<T*>(a.ptr[2]);
  const Range mine = share(N, a.part, a.parts);
  const Halved halved{a.i[1], a.i[2], C, a.i[4], a.i[5]};
  bool looks_halved = a.i[6] == 0 && halved.likely();
  for (int64_t n = mine.begin; n < mine.end; ++n) {
    T* image = dx + n * HW * C;
    if (looks_halved) {
      looks_halved = scatter_halved(halved, dy + n * P * C, idx + n * P * C, image);
      if (looks_halved) continue;
    }
    if (a.i[6] == 0) __builtin_memset(image, 0, static_cast<size_t>(HW * C) * sizeof(T));
    for (int64_t k = n * P; k < (n + 1) * P; ++k)
      for (int64_t c = 0; c < C; ++c) image[idx[k * C + c] * C + c] += dy[k * C + c];
  }
  return kOk;
}

namespace {

struct AvgInts {
  int64_t N, H, W, C, KH, KW, sh, sw, ph, pw, OH, OW, count_include_pad, divisor_override, mode;
  static const AvgInts& of(const int64_t* i) { return *reinterpret_cast<const AvgInts*>(i); }

  int64_t divisor(int64_t oh, int64_t ow) const {
    if (divisor_override) return divisor_override;
    const int64_t top = oh * sh - ph, left = ow * sw - pw;
    if (count_include_pad) return (min64(top + KH, H + ph) - top) * (min64(left + KW, W + pw) - left);
    return (min64(top + KH, H) - max64(top, 0)) * (min64(left + KW, W) - max64(left, 0));
  }
};

}  // namespace

template <class T>
int avg_pool(const Args& a) noexcept {
  const AvgInts& i = AvgInts::of(a.i);
  const T* x = static_cast<const T*>(a.ptr[0]);
  T* y = static_cast<T*>(a.ptr[1]);
  const Range mine = share(i.N * i.OH, a.part, a.parts);
  for (int64_t row = mine.begin; row < mine.end; ++row) {
    const int64_t oh = row % i.OH;
    const T* image = x + row / i.OH * i.H * i.W * i.C;
    const Taps down = Taps::of(oh, i.sh, i.ph, 1, i.KH, i.H);
    for (int64_t ow = 0; ow < i.OW; ++ow) {
      const Taps across = Taps::of(ow, i.sw, i.pw, 1, i.KW, i.W);
      const Vec<T> divisor = splat(static_cast<T>(i.divisor(oh, ow)));
      T* out = y + (row * i.OW + ow) * i.C;
      for_run<T>(i.C, [&](auto get, auto put) {
        Vec<T> sum{};
        for (int64_t h = down.begin; h < down.end; ++h)
          for (int64_t w = across.begin; w < across.end; ++w) sum += get(image + (h * i.W + w) * i.C);
        sum /= divisor;
        put(out, i.mode ? get(out) + sum : sum);
      });
    }
  }
  return kOk;
}

template <class T>
int avg_pool_adj(const Args& a) noexcept {
  const AvgInts& i = AvgInts::of(a.i);
  const T* dy = static_cast<const T*>(a.ptr[0]);
  T* dx = static_cast<T*>(a.ptr[1]);
  const Range mine = share(i.N, a.part, a.parts);
  for (int64_t n = mine.begin; n < mine.end; ++n) {
    T* image = dx + n * i.H * i.W * i.C;
    if (!i.mode) __builtin_memset(image, 0, static_cast<size_t>(i.H * i.W * i.C) * sizeof(T));
    for (int64_t oh = 0; oh < i.OH; ++oh)
      for (int64_t ow = 0; ow < i.OW; ++ow) {
        const Taps down = Taps::of(oh, i.sh, i.ph, 1, i.KH, i.H),
                   across = Taps::of(ow, i.sw, i.pw, 1, i.KW, i.W);
        const Vec<T> divisor = splat(static_cast<T>(i.divisor(oh, ow)));
        const T* in = dy + ((n * i.OH + oh) * i.OW + ow) * i.C;
        for (int64_t h = down.begin; h < down.end; ++h)
          for (int64_t w = across.begin; w < across.end; ++w) {
            T* out = image + (h * i.W + w) * i.C;
            for_run<T>(i.C, [&](auto get, auto put) { put(out, get(out) + get(in) / divisor); });
          }
      }
  }
  return kOk;
}

#define METAFAST_INSTANTIATE(name)                \
  template int name<float>(const Args&) noexcept; \
  template int name<double>(const Args&) noexcept;
METAFAST_INSTANTIATE(max_pool)
METAFAST_INSTANTIATE(pool_gather)
METAFAST_INSTANTIATE(pool_scatter)
METAFAST_INSTANTIATE(avg_pool)
METAFAST_INSTANTIATE(avg_pool_adj)

}  // namespace metafast::kernels::METAFAST_ISA
