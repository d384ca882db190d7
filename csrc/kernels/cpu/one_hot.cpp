#include "one_hot.hpp"

#include "sums.hpp"

namespace metafast::kernels::METAFAST_ISA {

namespace {

template <class T, class Label>
int indicate(const Args& a) noexcept {
  const int64_t N = a.i[0], C = a.i[1], stride = a.i[3];
  const bool wraps = a.i[5] != 0;
  const Label ignore = static_cast<Label>(a.i[2]);
  const Label* labels = static_cast<const Label*>(a.ptr[0]);
  T* out = static_cast<T*>(a.ptr[1]);
  int status = kOk;
  const Range mine = share(N, a.part, a.parts);
  for (int64_t n = mine.begin; n < mine.end; ++n) {
    Label label = labels[n * stride];
    for (int64_t c = 0; c < C; ++c) out[n * C + c] = T(0);
    if (label == ignore) continue;
    if (wraps && label < 0) label += static_cast<Label>(C);
    if (label >= 0 && label < static_cast<Label>(C))  // not so for NaN
      out[n * C + static_cast<int64_t>(label)] = T(1);
    else
      status = kLabelOutOfRange;
  }
  return status;
}

}  // namespace

template <class T>
int one_hot(const Args& a) noexcept {
  return a.i[4] != 0 ? indicate<T, T>(a) : indicate<T, int64_t>(a);
}

template <class T>
int fill(const Args& a) noexcept {
  const Range mine = share(a.i[0], a.part, a.parts, 64);
  const Vec<T> value = splat(static_cast<T>(a.f[0]));
  T* out = static_cast<T*>(a.ptr[0]) + mine.begin;
  for_run<T>(mine.end - mine.begin, [&](auto, auto put) { put(out, value); });
  return kOk;
}

template int one_hot<float>(const Args&) noexcept;
template int one_hot<double>(const Args&) noexcept;
template int fill<float>(const Args&) noexcept;
template int fill<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
