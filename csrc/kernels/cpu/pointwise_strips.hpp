// One call of a plan whose cluster has been made code: strips of rows that lie a pitch apart. Part of pointwise.cpp.
#pragma once
#include "pointwise_sums.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

template <class T>
struct Strips {
  static constexpr int64_t kElement = sizeof(T);
  static constexpr int64_t kCut = 1024;  // elements of a row that parts share come in multiples of so many
  const Plan<T>& p;
  const Args& args;
  Sums<T>& sums;
  code::Strip strip;
  int64_t unflushed = 0;  // elements that partial sums have taken up

  Strips(const Plan<T>& plan, const Args& a, Sums<T>& s) : p(plan), args(a), sums(s) {
    strip.immediates = p.immediates;
    const T one = 1;
    __builtin_memcpy(&strip.one, &one, sizeof one);
    strip.sign = uint64_t{1} << (8 * kElement - 1);
    strip.magnitude = strip.sign - 1;
  }

  // A part of the rows from `begin` to `end`: so many rows, or where there are few so much of each.
  void run(int64_t begin, int64_t end, int part, int parts) {
    unflushed = 0;
    const bool by_rows = end - begin >= 4 * parts;
    const Range rows = share(end - begin, part, by_rows ? parts : 1);
    const Range columns = by_rows ? Range{0, p.inner} : share(p.inner, part, parts, kCut);
    const int64_t longest = p.adds_up ? kFlushBlocks * p.block : p.inner;
    for (int64_t at = columns.begin; at < columns.end; at += longest)
      run_rows(begin + rows.begin, begin + rows.end, at, min64(longest, columns.end - at));
  }

 private:
  const int64_t* strides(int o) const { return p.strides + o * p.rank; }
  bool sum(int o) const { return o >= p.n_in && (p.outputs[o - p.n_in].mode & kSum); }

  // n elements of each row, from `at` on.
  void run_rows(int64_t begin, int64_t end, int64_t at, int64_t n) {
    const int64_t pitched = p.rank > 1 ? p.dims[p.rank - 2] : 1;
    const int64_t most = p.adds_up ? max64(1, kFlushBlocks * p.block / n) : end - begin;
    strip.whole = n / kLanes<T> * kLanes<T> * kElement;
    strip.rest = (uint64_t{1} << n % kLanes<T>)-1;
    for (int64_t row = begin; row < end; row += strip.rows) {
      strip.rows = min64(min64(pitched - row % pitched, end - row), most);
      if (p.adds_up) count(strip.rows * n);
      place(row, at);
      p.code(&strip);
    }
  }

  void count(int64_t elements) {
    if (unflushed && unflushed + elements > kFlushBlocks * p.block) sums.flush(), unflushed = 0;
    unflushed += elements;
  }

  void place(int64_t row, int64_t at) {
    for (int o = 0; o < p.n_in + p.n_out; ++o) {
      const int64_t along = at * strides(o)[p.rank - 1];
      if (sum(o))
        strip.at[o] = sums.at[o - p.n_in] + (p.outputs[o - p.n_in].lanes ? 0 : along);
      else
        strip.at[o] = static_cast<T*>(args.ptr[o]) + p.row_offset(strides(o), row) + (repeats(o) ? 0 : along);
    }
  }

  bool repeats(int o) const { return o < p.n_in && p.inputs[o].source == Source::vector; }
};

}  // namespace
}  // namespace metafast::kernels::METAFAST_ISA
