// What the outputs of a cluster that add up have come to so far. Part of pointwise.cpp.
#pragma once
#include "pointwise_plan.hpp"
#include "sums.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

// Of each output that adds up a partial sum, and a total that takes it up from time to time.
template <class T>
struct Sums {
  static constexpr int L = kLanes<T>;
  const Plan<T>& p;
  const Args& args;
  T* at[kMaxOperands];  // the partial sums
  bool flushed = false;

  Sums(const Plan<T>& plan, const Args& a) : p(plan), args(a) {
    T* after = reinterpret_cast<T*>(args.scratch) + (p.n_regs + 1) * (p.block + L);
    for (int o = 0; o < p.n_out; ++o)
      if (p.outputs[o].mode & kSum) at[o] = after, after += 2 * (p.outputs[o].sum_elements + L);
  }

  void clear() {
    flushed = false;
    for (int o = 0; o < p.n_out; ++o)
      if (p.outputs[o].mode & kSum)
        for (int64_t k = 0; k < 2 * (p.outputs[o].sum_elements + L); ++k) at[o][k] = 0;
  }

  void flush() {
    for (int o = 0; o < p.n_out; ++o) {
      if (!(p.outputs[o].mode & kSum)) continue;
      T *partial = at[o], *total = partial + p.outputs[o].sum_elements + L;
      for (int64_t k = 0; k < p.outputs[o].sum_elements; ++k) total[k] += partial[k], partial[k] = 0;
    }
    flushed = true;
  }

  void write(int64_t group) {
    if (flushed) flush();
    for (int o = 0; o < p.n_out; ++o) {
      const auto& out = p.outputs[o];
      if (!(out.mode & kSum)) continue;
      const T* total = at[o] + (flushed ? out.sum_elements + L : 0);
      const bool add = out.mode & 1, columns = out.inner_stride != 0;
      T* y = static_cast<T*>(args.ptr[p.n_in + o]) + (p.groups > 1 ? group * out.strides[0] : 0);
      if (out.lanes) {
        store(y, add ? load(y) + load(total) : load(total));
        continue;
      }
      if (!columns) {
        const T sum = sum_lanes<T>(load(total));
        *y = add ? *y + sum : sum;
      }
      if (columns)
        for_run<T>(p.inner, [&](auto get, auto put) { put(y, add ? get(y) + get(total) : get(total)); });
    }
  }
};

}  // namespace
}  // namespace metafast::kernels::METAFAST_ISA
