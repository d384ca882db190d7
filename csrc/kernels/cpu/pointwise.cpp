#include "pointwise.hpp"

#include "../common/opcodes.hpp"
#include "math.hpp"
#include "sums.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

constexpr int kMaxRank = kPointwiseRank, kMaxOperands = kPointwiseOperands, kMaxRegs = kPointwiseRegisters,
              kMaxOps = kPointwiseOps;

constexpr int64_t kSum = 2;           // bit of an output mode: add up over the dimensions of stride 0
constexpr int64_t kFlushBlocks = 64;  // partial sums of so many blocks go into the total at once

// A run of vectors in memory, or one vector again and again (step 0).
template <class T>
struct View {
  T* p;
  int64_t step;
};

template <class T, Opcode op>
METAFAST_INLINE Vec<T> apply(Vec<T> a, Vec<T> b, Vec<T> c) {
  const Vec<T> zero{}, one = splat(T(1));
  switch (op) {
    case Opcode::copy:
      return a;
    case Opcode::add:
      return a + b;
    case Opcode::sub:
      return a - b;
    case Opcode::mul:
      return a * b;
    case Opcode::div:
      return a / b;
    case Opcode::neg:
      return -a;
    case Opcode::exp:
      return exp_v(a);
    case Opcode::log:
      return log_v(a);
    case Opcode::sqrt:
      return sqrt_v<T>(a);
    case Opcode::rsqrt:
      return one / sqrt_v<T>(a);
    case Opcode::recip:
      return one / a;
    case Opcode::abs:
      return abs_v<T>(a);
    case Opcode::sign:
      return a > zero ? one : (a < zero ? -one : zero);  // 0 for NaN
    case Opcode::maximum:
      return max_nan<T>(a, b);
    case Opcode::minimum:
      return min_nan<T>(a, b);
    case Opcode::pow:
      return pow_v(a, b);
    case Opcode::tanh:
      return tanh_v(a);
    case Opcode::sigmoid:
      return sigmoid_v(a);
    case Opcode::erf:
      return erf_v(a);
    case Opcode::relu:
      return a <= zero ? zero : a;
    case Opcode::step:
      return a > zero ? one : zero;
    case Opcode::gt:
      return a > b ? one : zero;
    case Opcode::ge:
      return a >= b ? one : zero;
    case Opcode::lt:
      return a < b ? one : zero;
    case Opcode::le:
      return a <= b ? one : zero;
    case Opcode::eq:
      return a == b ? one : zero;
    case Opcode::ne:
      return a != b ? one : zero;
    case Opcode::where:
      return a != zero ? b : c;
    case Opcode::softplus:
      return softplus_v(a);
    case Opcode::expm1:
      return expm1_v(a);
    case Opcode::log1p:
      return log1p_v(a);
    case Opcode::sin:
      return sin_v(a);
    case Opcode::cos:
      return cos_v(a);
    case Opcode::fma:
      return fma<T>(a, b, c);
    case Opcode::square:
      return a * a;
    case Opcode::floor:
      return floor_v(a);
    case Opcode::count:
      break;
  }
  return a;
}

template <class T>
using Loop = void (*)(T* dst, View<T> a, View<T> b, View<T> c, int64_t n) noexcept;

template <class T, Opcode op, int arity>
void loop(T* dst, View<T> a, View<T> b, View<T> c, int64_t n) noexcept {
  constexpr int L = kLanes<T>;
  const Vec<T> none{};
#pragma GCC unroll 4
  for (int64_t k = n / L; k > 0; --k) {
    store(dst, apply<T, op>(load(a.p), arity > 1 ? load(b.p) : none, arity > 2 ? load(c.p) : none));
    dst += L, a.p += a.step;
    if constexpr (arity > 1) b.p += b.step;
    if constexpr (arity > 2) c.p += c.step;
  }
  if (const int64_t rest = n % L) {
    const Mask<T> m(rest);
    store(dst, apply<T, op>(load(a.p, m), arity > 1 ? load(b.p, m) : none, arity > 2 ? load(c.p, m) : none),
          m);
  }
}

struct OpcodeArity {
  static constexpr int of[] = {
#define X(name, operands) operands,
      METAFAST_POINTWISE_OPCODES(X)
#undef X
  };
};

template <class T>
struct Loops {
  static constexpr Loop<T> of[] = {
#define X(name, operands) loop<T, Opcode::name, operands>,
      METAFAST_POINTWISE_OPCODES(X)
#undef X
  };
};

// The ints of a call, by name.
struct Program {
  int64_t rank, n_in, n_out, n_ops, n_regs;
  const int64_t *dims, *strides, *out_reg, *out_mode, *ops;  // strides: of all inputs, then of all outputs

  explicit Program(const int64_t* i)
      : rank(i[0]),
        n_in(i[1]),
        n_out(i[2]),
        n_ops(i[3]),
        n_regs(i[4]),
        dims(i + 5),
        strides(dims + rank),
        out_reg(strides + (n_in + n_out) * rank),
        out_mode(out_reg + n_out),
        ops(out_mode + n_out) {}

  int64_t immediates() const {
    int64_t lowest = 0;
    for (int64_t k = 0; k < n_ops; ++k)
      for (int j = 0; j < OpcodeArity::of[ops[5 * k]]; ++j) lowest = min64(lowest, ops[5 * k + 2 + j]);
    return -lowest;
  }

  bool sums() const {
    for (int64_t o = 0; o < n_out; ++o)
      if (out_mode[o] & kSum) return true;
    return false;
  }

  // Elements of output o that are kept apart, a vector of slack included.
  template <class T>
  int64_t sum_elements(int64_t o) const {
    int64_t kept = kLanes<T>;
    for (int64_t d = 0; d < rank; ++d)
      if (strides[(n_in + o) * rank + d] != 0) kept *= dims[d];
    return kept + kLanes<T>;
  }
};

// Elements of a block: all registers together fill half of a small L1.
template <class T>
int64_t block_elements(int64_t n_regs) {
  const int64_t fitting = 24576 / (static_cast<int64_t>(sizeof(T)) * max64(n_regs, 1));
  return max64(128, min64(1024, fitting / 64 * 64));
}

// The index space with unit dimensions dropped and neighbours merged, in the order of the first output's
// memory.
struct Space {
  int rank = 0;
  int64_t dims[kMaxRank], strides[kMaxOperands][kMaxRank];
  int operands;
  int64_t elements = 1;

  explicit Space(const Program& p) : operands(static_cast<int>(p.n_in + p.n_out)) {
    int order[kMaxRank];
    const int count = outermost_first(p, order);
    for (int k = 0; k < count; ++k) append(p, order[k]);
    if (rank == 0) {
      rank = 1, dims[0] = 1;
      for (int o = 0; o < operands; ++o) strides[o][0] = 1;
    }
  }

  int64_t inner() const { return dims[rank - 1]; }

  // Offset of row `row` (all dimensions but the last) in operand o.
  int64_t row_offset(int o, int64_t row) const {
    int64_t offset = 0;
    for (int d = rank - 2; d > 0; --d) {
      offset += row % dims[d] * strides[o][d];
      row /= dims[d];
    }
    return rank > 1 ? offset + row * strides[o][0] : 0;
  }

  bool dense(int o) const {
    int64_t expected = 1;
    for (int d = rank - 1; d >= 0; --d) {
      if (strides[o][d] != expected) return false;
      expected *= dims[d];
    }
    return true;
  }

 private:
  int outermost_first(const Program& p, int* order) {
    // A sum has no place of its own for what it adds up: where one comes first, the order given holds.
    const int64_t* out = p.out_mode[0] < kSum ? p.strides + p.n_in * p.rank : nullptr;
    int count = 0;
    for (int d = 0; d < p.rank; ++d) {
      elements *= p.dims[d];
      if (p.dims[d] == 1) continue;
      int at = count++;
      for (; out && at > 0 && out[order[at - 1]] < out[d]; --at) order[at] = order[at - 1];
      order[at] = d;
    }
    return count;
  }

  void append(const Program& p, int d) {
    bool merges = rank > 0;
    for (int o = 0; merges && o < operands; ++o)
      merges = strides[o][rank - 1] == p.strides[o * p.rank + d] * p.dims[d];
    if (merges)
      dims[rank - 1] *= p.dims[d];
    else
      dims[rank++] = p.dims[d];
    for (int o = 0; o < operands; ++o) strides[o][rank - 1] = p.strides[o * p.rank + d];
  }
};

// Copies rows row0.. of operand o, one after the other, to dst (which has a vector of slack behind it).
template <class T>
void gather_rows(T* dst, const T* base, const Space& s, int o, int64_t row0, int64_t rows) {
  constexpr int L = kLanes<T>;
  const int64_t inner = s.inner(), stride = s.strides[o][s.rank - 1];
  for (int64_t r = row0; r < row0 + rows; ++r, dst += inner) {
    const T* p = base + s.row_offset(o, r);
    if (stride == 0) {
      for (int64_t k = 0; k < inner; k += L) store(dst + k, splat(*p));
    } else if (stride == 1) {
      int64_t k = 0;
      for (; k + L <= inner; k += L) store(dst + k, load(p + k));
      if (k < inner) store(dst + k, load(p + k, Mask<T>(inner - k)));
    } else {
      for (int64_t k = 0; k < inner; ++k) dst[k] = p[k * stride];
    }
  }
}

template <class T>
void scatter_rows(T* base, const T* src, const Space& s, int o, int64_t row0, int64_t rows, bool add) {
  const int64_t inner = s.inner(), stride = s.strides[o][s.rank - 1];
  for (int64_t r = row0; r < row0 + rows; ++r, src += inner) {
    T* p = base + s.row_offset(o, r);
    for (int64_t k = 0; k < inner; ++k) p[k * stride] = add ? p[k * stride] + src[k] : src[k];
  }
}

template <class T>
struct Interpreter {
  struct Op {
    Loop<T> run;
    int dst, a, b, c;
  };
  enum class Access { direct, splat, row_splat, rows, repeated };

  static constexpr int L = kLanes<T>;
  const Args& args;
  const Program p;
  const Space s;
  const int64_t block;
  bool by_rows;  // a block holds whole rows, not a piece of one
  Op ops[kMaxOps];
  View<T> views[kMaxRegs + kMaxRegs];  // registers, then immediates
  Access access[kMaxOperands];
  bool in_place[kMaxOperands];  // per output: its register is the output's memory
  T* buffers;                   // one block and a vector for each register
  T* sums[kMaxOperands];        // per summing output: partial sums, then totals
  int64_t sum_size[kMaxOperands];
  int64_t unflushed = 0;

  Interpreter(const Args& a) : args(a), p(a.i), s(p), block(block_elements<T>(p.n_regs)) {
    by_rows = s.rank > 1 && 2 * s.inner() <= block;
    T* at = reinterpret_cast<T*>(args.scratch);
    const int64_t immediates = p.immediates();
    for (int64_t k = 0; k < immediates; ++k, at += L) {
      store(at, splat(static_cast<T>(args.f[k])));
      views[p.n_regs + k] = {at, 0};
    }
    buffers = at;
    for (int64_t r = p.n_in; r < p.n_regs; ++r) views[r] = {buffer(r), L};
    for (int64_t k = 0; k < p.n_ops; ++k) decode(p.ops + 5 * k, &ops[k]);
    for (int o = 0; o < p.n_in; ++o) access[o] = input_access(o);
    for (int o = 0; o < p.n_out; ++o) in_place[o] = may_write_in_place(o);
    T* after = buffer(p.n_regs + 1);
    for (int o = 0; o < p.n_out; ++o) {
      if (!(p.out_mode[o] & kSum)) continue;
      sums[o] = after;
      sum_size[o] = inner_stride(static_cast<int>(p.n_in) + o) ? s.inner() : L;
      for (int64_t k = 0; k < 2 * (sum_size[o] + L); ++k) after[k] = 0;
      after += 2 * (sum_size[o] + L);
    }
  }

  T* buffer(int64_t r) const { return buffers + r * (block + L); }
  T* pointer(int o) const { return static_cast<T*>(args.ptr[o]); }
  int64_t inner_stride(int o) const { return s.strides[o][s.rank - 1]; }

  void decode(const int64_t* op, Op* out) const {
    const int arity = OpcodeArity::of[op[0]];
    auto source = [&](int j) {
      return j < arity ? static_cast<int>(op[2 + j] >= 0 ? op[2 + j] : p.n_regs - 1 - op[2 + j]) : 0;
    };
    *out = {Loops<T>::of[op[0]], static_cast<int>(op[1]), source(0), source(1), source(2)};
  }

  Access input_access(int o) {
    bool outer_zero = true;
    for (int d = 0; d + 1 < s.rank; ++d) outer_zero &= s.strides[o][d] == 0;
    if (inner_stride(o) == 0 && outer_zero) {
      store(buffer(o), splat(*pointer(o)));
      views[o] = {buffer(o), 0};
      return Access::splat;
    }
    if (by_rows ? s.dense(o) : inner_stride(o) == 1) return views[o].step = L, Access::direct;
    if (!by_rows && inner_stride(o) == 0) return views[o] = {buffer(o), 0}, Access::row_splat;
    views[o] = {buffer(o), L};
    if (!by_rows || !outer_zero) return Access::rows;
    gather_rows<T>(buffer(o), pointer(o), s, o, 0, min64(block / s.inner(), s.elements / s.inner()));
    return Access::repeated;
  }

  bool contiguous_output(int o) const {
    const int operand = static_cast<int>(p.n_in) + o;
    return by_rows ? s.dense(operand) : inner_stride(operand) == 1;
  }

  // The register of output o may live in the output's memory unless an operation after its first write still
  // reads an input that lies there, or another output claims the register.
  bool may_write_in_place(int o) const {
    const int64_t reg = p.out_reg[o];
    if ((p.out_mode[o] & kSum) || reg < p.n_in || p.out_mode[o] != 0 || !contiguous_output(o)) return false;
    for (int other = 0; other < o; ++other)
      if (p.out_reg[other] == reg) return false;
    for (int in = 0; in < p.n_in; ++in)
      if (pointer(in) == pointer(static_cast<int>(p.n_in) + o) && read_after_write(in, reg)) return false;
    return true;
  }

  bool read_after_write(int in, int64_t reg) const {
    bool written = false;
    for (int64_t k = 0; k < p.n_ops; ++k) {
      const int64_t* op = p.ops + 5 * k;
      for (int j = 0; written && j < OpcodeArity::of[op[0]]; ++j)
        if (op[2 + j] == in) return true;
      written |= op[1] == reg;
    }
    for (int o = 0; o < p.n_out; ++o)
      if (p.out_reg[o] == in) return true;
    return false;
  }

  // Runs all operations on n elements from element `at` of row `row` (by_rows: on n elements of whole rows
  // from `row`).
  void run_block(int64_t row, int64_t at, int64_t n) {
    const int64_t rows = by_rows ? n / s.inner() : 1;
    auto address = [&](int o) {
      return pointer(o) + (by_rows ? row * s.inner() : s.row_offset(o, row) + at);
    };
    for (int o = 0; o < p.n_in; ++o) {
      switch (access[o]) {
        case Access::direct:
          views[o].p = address(o);
          break;
        case Access::row_splat:
          store(buffer(o), splat(pointer(o)[s.row_offset(o, row)]));
          break;
        case Access::rows:
          if (by_rows)
            gather_rows<T>(buffer(o), pointer(o), s, o, row, rows);
          else
            gather_piece(o, row, at, n);
          break;
        default:
          break;
      }
    }
    for (int o = 0; o < p.n_out; ++o)
      if (in_place[o]) views[p.out_reg[o]].p = address(static_cast<int>(p.n_in) + o);
    for (int64_t k = 0; k < p.n_ops; ++k) {
      const Op& op = ops[k];
      op.run(views[op.dst].p, views[op.a], views[op.b], views[op.c], n);
    }
    for (int o = 0; o < p.n_out; ++o) {
      if (p.out_mode[o] & kSum)
        add_to_sum(o, at, n, rows);
      else if (!in_place[o])
        write_output(o, row, at, n, rows);
    }
    if (++unflushed == kFlushBlocks) flush();
  }

  // Adds a block to the partial sums of output o: by columns where the last dimension is kept, else by lanes.
  void add_to_sum(int o, int64_t at, int64_t n, int64_t rows) {
    const View<T> value = views[p.out_reg[o]];
    if (inner_stride(static_cast<int>(p.n_in) + o) == 0) {
      Vec<T> total = load(sums[o]);
      const T* src = value.p;
      for (int64_t k = n / L; k > 0; --k, src += value.step) total = total + load(src);
      if (n % L) total = total + keep<T>(load(src, Mask<T>(n % L)), Mask<T>(n % L));
      store(sums[o], total);
      return;
    }
    const T* src = value.p;
    if (value.step == 0) {
      loop<T, Opcode::copy, 1>(buffer(p.n_regs), value, {}, {}, n);
      src = buffer(p.n_regs);
    }
    const int64_t width = by_rows ? s.inner() : n;
    T* to = sums[o] + (by_rows ? 0 : at);
    for (int64_t k = 0; k < width; k += L) {
      const Mask<T> m(min64(L, width - k));
      Vec<T> total = load(to + k, m);
      for (int64_t r = 0; r < rows; ++r) total = total + load(src + r * width + k, m);
      store(to + k, total, m);
    }
  }

  void flush() {
    for (int o = 0; o < p.n_out; ++o) {
      if (!(p.out_mode[o] & kSum)) continue;
      T *partial = sums[o], *total = partial + sum_size[o] + L;
      for (int64_t k = 0; k < sum_size[o]; ++k) total[k] += partial[k], partial[k] = 0;
    }
    unflushed = 0;
  }

  void write_sums() {
    flush();
    for (int o = 0; o < p.n_out; ++o) {
      if (!(p.out_mode[o] & kSum)) continue;
      const int operand = static_cast<int>(p.n_in) + o;
      const T* total = sums[o] + sum_size[o] + L;
      const bool add = p.out_mode[o] & 1, columns = inner_stride(operand) != 0;
      T* y = pointer(operand);
      if (!columns) {
        const T sum = sum_lanes<T>(load(total));
        *y = add ? *y + sum : sum;
      }
      for (int64_t k = 0; columns && k < s.inner(); ++k) y[k] = add ? y[k] + total[k] : total[k];
    }
  }

  void gather_piece(int o, int64_t row, int64_t at, int64_t n) {
    const T* src = pointer(o) + s.row_offset(o, row) + at * inner_stride(o);
    for (int64_t k = 0; k < n; ++k) buffer(o)[k] = src[k * inner_stride(o)];
  }

  void write_output(int o, int64_t row, int64_t at, int64_t n, int64_t rows) {
    const int operand = static_cast<int>(p.n_in) + o;
    const View<T> value = views[p.out_reg[o]];
    const bool add = p.out_mode[o] != 0;
    if (contiguous_output(o)) {
      T* dst = pointer(operand) + (by_rows ? row * s.inner() : s.row_offset(operand, row) + at);
      if (add)
        loop<T, Opcode::add, 2>(dst, {dst, L}, value, {}, n);
      else
        loop<T, Opcode::copy, 1>(dst, value, {}, {}, n);
      return;
    }
    const T* src = value.p;
    if (value.step == 0 || p.out_reg[o] < p.n_in) {  // scatter reads element by element
      T* plain = buffer(p.n_regs);
      loop<T, Opcode::copy, 1>(plain, value, {}, {}, n);
      src = plain;
    }
    if (by_rows) return scatter_rows<T>(pointer(operand), src, s, operand, row, rows, add);
    T* dst = pointer(operand) + s.row_offset(operand, row) + at * inner_stride(operand);
    for (int64_t k = 0; k < n; ++k) {
      T& y = dst[k * inner_stride(operand)];
      y = add ? y + src[k] : src[k];
    }
  }

  // A sum is one part's work: its order must not depend on the number of parts.
  void run() {
    const bool adds_up = p.sums();
    if (adds_up && args.part > 0) return;
    run_share(adds_up ? 1 : args.parts);
    if (adds_up) write_sums();
  }

  void run_share(int parts) {
    const int64_t inner = s.inner(), rows = s.elements / inner;
    if (by_rows) {
      const int64_t per_block = block / inner;
      const Range mine = share(rows, args.part, parts, per_block);
      for (int64_t row = mine.begin; row < mine.end; row += per_block)
        run_block(row, 0, min64(per_block, mine.end - row) * inner);
      return;
    }
    const int64_t pieces = (inner + block - 1) / block;
    const Range mine = share(rows * pieces, args.part, parts);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const int64_t row = b / pieces, at = b % pieces * block;
      run_block(row, at, min64(block, inner - at));
    }
  }
};

}  // namespace

template <class T>
int64_t pointwise_scratch(const int64_t* ints) noexcept {
  const Program p(ints);
  int64_t elements = p.immediates() * kLanes<T> + (p.n_regs + 1) * (block_elements<T>(p.n_regs) + kLanes<T>);
  for (int64_t o = 0; o < p.n_out; ++o)
    if (p.out_mode[o] & kSum) elements += 2 * p.sum_elements<T>(o);
  return elements * static_cast<int64_t>(sizeof(T));
}

template <class T>
int pointwise(const Args& a) noexcept {
  const Program p(a.i);
  for (int64_t d = 0; d < p.rank; ++d)
    if (p.dims[d] == 0) return kOk;
  Interpreter<T> interpreter(a);
  interpreter.run();
  return kOk;
}

template int pointwise<float>(const Args&) noexcept;
template int pointwise<double>(const Args&) noexcept;
template int64_t pointwise_scratch<float>(const int64_t*) noexcept;
template int64_t pointwise_scratch<double>(const int64_t*) noexcept;

}  // namespace metafast::kernels::METAFAST_ISA
