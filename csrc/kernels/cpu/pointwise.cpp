#include "pointwise.hpp"

#include "pointwise_plan.hpp"
#include "pointwise_strips.hpp"
#include "pointwise_sums.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

// The elements of a run of rows: where a row has fewer than the run, one of each row at a time, so that what lies side by
// side across rows (an image of few channels, channels first) is walked in order.
template <class Move>
METAFAST_INLINE void each_element(int64_t rows, int64_t inner, Move move) {
  if (inner < rows) {
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t r = 0; r < rows; ++r) move(r, k);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < inner; ++k) move(r, k);
  }
}

// Copies rows row0.. of an operand, one after the other, to dst (which has a vector of slack behind it).
template <class T>
void gather_rows(T* dst, const T* base, const Plan<T>& p, const typename Plan<T>::Input& in, int64_t row0,
                 int64_t rows) {
  constexpr int L = kLanes<T>;
  const int64_t inner = p.inner, stride = in.inner_stride;
  p.each_run(in.strides, row0, rows, [&](int64_t offset, int64_t step, int64_t count) {
    const T* src = base + offset;
    if (stride != 0 && stride != 1) {
      each_element(count, inner,
                   [&](int64_t r, int64_t k) { dst[r * inner + k] = src[r * step + k * stride]; });
      dst += count * inner;
      return;
    }
    for (int64_t r = 0; r < count; ++r, dst += inner, src += step) {
      int64_t k = 0;
      if (stride == 0)
        for (; k < inner; k += L) store(dst + k, splat(*src));
      for (; k + L <= inner; k += L) store(dst + k, load(src + k));
      if (k < inner) store(dst + k, load(src + k, Mask<T>(inner - k)));
    }
  });
}

template <class T>
void scatter_rows(T* base, const T* src, const Plan<T>& p, const typename Plan<T>::Output& out, int64_t row0,
                  int64_t rows, bool add) {
  const int64_t inner = p.inner, stride = out.inner_stride;
  p.each_run(out.strides, row0, rows, [&](int64_t offset, int64_t step, int64_t count) {
    each_element(count, inner, [&](int64_t r, int64_t k) {
      T& y = base[offset + r * step + k * stride];
      y = add ? y + src[r * inner + k] : src[r * inner + k];
    });
    src += count * inner;
  });
}

// One call of a plan, operation by operation. Scratch: a block and a vector for each register and one more, then the
// sums.
template <class T>
struct Interpreter {
  static constexpr int L = kLanes<T>;
  const Plan<T>& p;
  const Args& args;
  View<T> views[kMaxRegs + kMaxRegs];  // registers, then immediates
  bool in_place[kMaxOperands];         // per output: its register is the output's memory
  Sums<T>& sums;
  int64_t unflushed = 0;

  Interpreter(const Plan<T>& plan, const Args& a, Sums<T>& s) : p(plan), args(a), sums(s) {
    for (int k = 0; k < p.n_immediates; ++k)
      views[p.n_regs + k] = {const_cast<T*>(p.immediates) + k * L, 0, 0};
    for (int r = p.n_in; r < p.n_regs; ++r) views[r] = {buffer(r), L, p.inner};
    for (int o = 0; o < p.n_in; ++o) prepare_input(o);
    for (int o = 0; o < p.n_out; ++o) in_place[o] = p.outputs[o].in_place && !overwrites(o);
  }

  T* buffer(int64_t r) const { return reinterpret_cast<T*>(args.scratch) + r * (p.block + L); }
  T* pointer(int o) const { return static_cast<T*>(args.ptr[o]); }
  T* out_pointer(int o) const { return static_cast<T*>(args.ptr[p.n_in + o]); }

  void prepare_input(int o) {
    const auto& in = p.inputs[o];
    switch (in.source) {
      case Source::direct:
      case Source::pitched:
        views[o] = {nullptr, L, in.source == Source::direct ? p.inner : in.pitch};
        break;
      case Source::vector:
        views[o] = {nullptr, 0, 0};
        break;
      case Source::vectors:
        views[o] = {buffer(o), 0, L};
        break;
      case Source::splat:
        store(buffer(o), splat(*pointer(o)));
        [[fallthrough]];
      case Source::row_splat:
        views[o] = {buffer(o), 0, 0};
        break;
      case Source::repeated:
        gather_rows<T>(buffer(o), pointer(o), p, in, 0, min64(p.block / p.inner, p.rows));
        [[fallthrough]];
      case Source::rows:
        views[o] = {buffer(o), L, p.inner};
        break;
    }
  }

  // Whether output o would overwrite an input that is read later.
  bool overwrites(int o) const {
    for (uint32_t left = p.outputs[o].read_late; left; left &= left - 1)
      if (args.ptr[__builtin_ctz(left)] == args.ptr[p.n_in + o]) return true;
    return false;
  }

  // Runs all operations on n elements from element `at` of row `row` (by_rows: on n elements of whole rows
  // from `row`).
  void run_block(int64_t row, int64_t at, int64_t n) {
    const int64_t rows = p.by_rows ? n / p.inner : 1;
    auto address = [&](T* base, const int64_t* strides) {
      return base + (p.by_rows ? row * p.inner : p.row_offset(strides, row) + at);
    };
    for (int o = 0; o < p.n_in; ++o) {
      const auto& in = p.inputs[o];
      if (in.source == Source::direct) {
        views[o].p = address(pointer(o), in.strides);
      } else if (in.source == Source::vector) {
        views[o].p = pointer(o) + p.row_offset(in.strides, row);
      } else if (in.source == Source::pitched) {
        views[o].p = pointer(o) + row * in.pitch;
      } else if (in.source == Source::vectors) {
        for (int64_t r = 0; r < rows; ++r) store(buffer(o) + r * L, splat(pointer(o)[(row + r) * in.pitch]));
      } else if (in.source == Source::row_splat) {
        store(buffer(o), splat(pointer(o)[p.row_offset(in.strides, row)]));
      } else if (in.source == Source::rows) {
        if (p.by_rows)
          gather_rows<T>(buffer(o), pointer(o), p, in, row, rows);
        else
          gather_piece(o, row, at, n);
      }
    }
    for (int o = 0; o < p.n_out; ++o)
      if (in_place[o]) views[p.outputs[o].reg].p = address(out_pointer(o), p.outputs[o].strides);
    for (int k = 0; k < p.n_ops; ++k) {
      const auto& op = p.ops[k];
      op.run(views[op.dst].p, views[op.a], views[op.b], views[op.c], op.by_rows ? p.inner : n,
             op.by_rows ? rows : 1);
    }
    for (int o = 0; o < p.n_out; ++o) {
      if (p.outputs[o].mode & kSum)
        add_to_sum(o, at, n, rows);
      else if (!in_place[o])
        write_output(o, row, at, n, rows);
    }
    if (p.adds_up && ++unflushed == kFlushBlocks) sums.flush(), unflushed = 0;
  }

  // Adds a block to the partial sums of output o: by columns where the last dimension is kept, else by lanes.
  void add_to_sum(int o, int64_t at, int64_t n, int64_t rows) {
    const View<T> value = views[p.outputs[o].reg];
    if (p.outputs[o].inner_stride == 0 || p.outputs[o].lanes) {
      Vec<T> total = load(sums.at[o]);
      const T* src = value.p;
      for (int64_t k = n / L; k > 0; --k, src += value.step) total = total + load(src);
      if (n % L) total = total + keep<T>(load(src, Mask<T>(n % L)), Mask<T>(n % L));
      store(sums.at[o], total);
      return;
    }
    const T* src = value.p;
    if (value.step == 0) {
      copy(buffer(p.n_regs), value, n);
      src = buffer(p.n_regs);
    }
    const int64_t width = p.by_rows ? p.inner : n;
    T* to = sums.at[o] + (p.by_rows ? 0 : at);
    for_run<T>(width, [&](auto get, auto put) {
      Vec<T> total = get(to);
      for (int64_t r = 0; r < rows; ++r) total = total + get(src + r * width);
      put(to, total);
    });
  }

  void gather_piece(int o, int64_t row, int64_t at, int64_t n) {
    const int64_t stride = p.inputs[o].inner_stride;
    const T* src = pointer(o) + p.row_offset(p.inputs[o].strides, row) + at * stride;
    for (int64_t k = 0; k < n; ++k) buffer(o)[k] = src[k * stride];
  }

  void write_output(int o, int64_t row, int64_t at, int64_t n, int64_t rows) {
    const auto& out = p.outputs[o];
    const View<T> value = views[out.reg];
    const bool add = out.mode != 0;
    if (out.contiguous) {
      T* dst = out_pointer(o) + (p.by_rows ? row * p.inner : p.row_offset(out.strides, row) + at);
      if (add)
        Loops<T>::find(Opcode::add, value.step == 0 ? 2 : 0)(dst, {dst, L, 0}, value, value, n, 1);
      else
        copy(dst, value, n);
      return;
    }
    const T* src = value.p;
    if (value.step == 0 || out.reg < p.n_in) {  // scatter reads element by element
      T* plain = buffer(p.n_regs);
      copy(plain, value, n);
      src = plain;
    }
    if (p.by_rows) return scatter_rows<T>(out_pointer(o), src, p, out, row, rows, add);
    T* dst = out_pointer(o) + p.row_offset(out.strides, row) + at * out.inner_stride;
    for (int64_t k = 0; k < n; ++k) {
      T& y = dst[k * out.inner_stride];
      y = add ? y + src[k] : src[k];
    }
  }

  // A part of the rows from `begin` to `end`.
  void run(int64_t begin, int64_t end, int part, int parts) {
    unflushed = 0;
    if (parts == 1 && p.rows == 1 && p.inner <= p.block) return run_block(0, 0, p.inner);
    if (p.by_rows) {
      const int64_t per_block = p.block / p.inner;
      const Range mine = share(end - begin, part, parts, per_block);
      for (int64_t row = begin + mine.begin; row < begin + mine.end; row += per_block)
        run_block(row, 0, min64(per_block, begin + mine.end - row) * p.inner);
      return;
    }
    const int64_t pieces = (p.inner + p.block - 1) / p.block;
    const Range mine = share((end - begin) * pieces, part, parts);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const int64_t row = begin + b / pieces, at = b % pieces * p.block;
      run_block(row, at, min64(p.block, p.inner - at));
    }
  }
};

// A sum is one part's work: its order must not depend on the number of parts.
template <class T, class Runner>
void run_groups(const Plan<T>& p, const Args& a, Sums<T>& sums, Runner runner) {
  if (!p.adds_up) return runner.run(0, p.rows, a.part, a.parts);
  if (p.groups == 1 && a.part > 0) return;
  const Range mine = p.groups == 1 ? Range{0, 1} : share(p.groups, a.part, a.parts);
  const int64_t rows = p.rows / p.groups;
  for (int64_t group = mine.begin; group < mine.end; ++group) {
    sums.clear();
    runner.run(group * rows, (group + 1) * rows, 0, 1);
    sums.write(group);
  }
}

// A sum of nothing is 0.
template <class T>
void clear_sums_of_nothing(const Plan<T>& p, const Args& a) {
  for (int o = 0; a.part == 0 && o < p.n_out; ++o) {
    const auto& out = p.outputs[o];
    const int64_t kept = out.lanes ? kLanes<T> : out.inner_stride ? p.inner : 1;
    T* y = static_cast<T*>(a.ptr[p.n_in + o]);
    for (int64_t g = 0; out.mode == kSum && g < p.groups; ++g)
      for (int64_t k = 0; k < kept; ++k) y[g * out.strides[0] + k] = 0;
  }
}

}  // namespace

template <class T>
int64_t pointwise_prepared_bytes(const int64_t* ints) noexcept {
  return Plan<T>::bytes(Program(ints));
}

template <class T>
void pointwise_prepare(const int64_t* ints, const double* f, std::byte* place) noexcept {
  Plan<T>::write(ints, f, place);
}

template <class T>
int64_t pointwise_scratch(const int64_t* ints) noexcept {
  const Program p(ints);
  int64_t elements = (p.n_regs + 1) * (block_elements<T>(p.n_regs) + kLanes<T>);
  for (int64_t o = 0; o < p.n_out; ++o)
    if (p.out_mode[o] & kSum) elements += 2 * p.sum_elements<T>(o);
  return elements * static_cast<int64_t>(sizeof(T));
}

template <class T>
int pointwise(const Args& a) noexcept {
  const Plan<T>& plan = *reinterpret_cast<const Plan<T>*>(a.prepared);
  if (plan.empty) {
    clear_sums_of_nothing(plan, a);
    return kOk;
  }
  Sums<T> sums(plan, a);
  if (plan.code)
    run_groups(plan, a, sums, Strips<T>(plan, a, sums));
  else
    run_groups(plan, a, sums, Interpreter<T>(plan, a, sums));
  return kOk;
}

#define METAFAST_INSTANTIATE(T)                                          \
  template int pointwise<T>(const Args&) noexcept;                       \
  template int64_t pointwise_scratch<T>(const int64_t*) noexcept;        \
  template int64_t pointwise_prepared_bytes<T>(const int64_t*) noexcept; \
  template void pointwise_prepare<T>(const int64_t*, const double*, std::byte*) noexcept;
METAFAST_INSTANTIATE(float)
METAFAST_INSTANTIATE(double)

}  // namespace metafast::kernels::METAFAST_ISA
