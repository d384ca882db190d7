#include "scan.hpp"

namespace metafast::kernels::METAFAST_ISA {

template <class T>
int cumsum(const Args& a) noexcept {
  constexpr int64_t kColumns = 16;  // neighbouring sums that are carried together
  const int64_t outer = a.i[0], reduce = a.i[1], inner = a.i[2];
  const int64_t first = a.i[3] ? reduce - 1 : 0, step = a.i[3] ? -inner : inner;
  const int64_t blocks = (inner + kColumns - 1) / kColumns;
  const Range mine = share(outer * blocks, a.part, a.parts);
  for (int64_t k = mine.begin; k < mine.end; ++k) {
    const int64_t column = k % blocks * kColumns, width = min64(kColumns, inner - column);
    const int64_t start = (k / blocks * reduce + first) * inner + column;
    const T* x = static_cast<const T*>(a.ptr[0]) + start;
    T* y = static_cast<T*>(a.ptr[1]) + start;
    double sum[kColumns] = {};
    for (int64_t r = 0; r < reduce; ++r)
      for (int64_t j = 0; j < width; ++j) y[r * step + j] = static_cast<T>(sum[j] += x[r * step + j]);
  }
  return kOk;
}

template int cumsum<float>(const Args&) noexcept;
template int cumsum<double>(const Args&) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
