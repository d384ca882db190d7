#include "pointwise.hpp"

#include "../common/opcodes.hpp"
#include "math.hpp"
#include "sums.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

constexpr int kMaxRank = kPointwiseRank, kMaxOperands = kPointwiseOperands, kMaxRegs = kPointwiseRegisters,
              kMaxOps = kPointwiseOps;

constexpr int64_t kSum = 2;            // bit of an output mode: add up over the dimensions of stride 0
constexpr int64_t kFlushBlocks = 64;   // partial sums of so many blocks go into the total at once
constexpr int64_t kWalkedVectors = 2;  // shorter rows of inputs are gathered rather than walked

// Rows of vectors in memory: `step` elements from vector to vector, 0 for one vector again and again, and
// `pitch` from row to row.
template <class T>
struct View {
  T* p;
  int64_t step, pitch;
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
    case Opcode::where_positive:
      return a > zero ? b : c;
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
    case Opcode::atan:
      return atan_v(a);
    case Opcode::count:
      break;
  }
  return a;
}

// One operation on `rows` rows of n elements; those of dst lie one after the other.
template <class T>
using Loop = void (*)(T* dst, const View<T>& a, const View<T>& b, const View<T>& c, int64_t n,
                      int64_t rows) noexcept;

// Bit j of `fixed`: operand j is one vector all along a row.
template <class T, Opcode op, int arity, int fixed>
void loop(T* dst, const View<T>& a, const View<T>& b, const View<T>& c, int64_t n, int64_t rows) noexcept {
  constexpr int L = kLanes<T>;
  const Vec<T> none{};
  const int64_t rest = n & (L - 1), whole = n - rest;
  const Mask<T> last(rest);
  View<T> x = a, y = b, z = c;  // else the compiler reads these anew after every store
  for (; rows > 0; --rows, dst += n, x.p += x.pitch, y.p += y.pitch, z.p += z.pitch) {
    const Vec<T> x0 = fixed & 1 ? load(x.p) : none, y0 = fixed & 2 ? load(y.p) : none,
                 z0 = fixed & 4 ? load(z.p) : none;
    const auto run = [&](int64_t at, auto lanes) {
      const Vec<T> xs = fixed & 1 ? x0 : load(x.p + at, lanes);
      const Vec<T> ys = fixed & 2 || arity < 2 ? y0 : load(y.p + at, lanes);
      const Vec<T> zs = fixed & 4 || arity < 3 ? z0 : load(z.p + at, lanes);
      store(dst + at, apply<T, op>(xs, ys, zs), lanes);
    };
#pragma GCC unroll 4
    for (int64_t at = 0; at < whole; at += L) run(at, Whole{});
    if (rest) run(whole, last);
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
  template <Opcode op, int arity, int fixed>
  static constexpr Loop<T> entry = loop<T, op, arity, fixed & ((1 << arity) - 1)>;
  static constexpr Loop<T> of[][8] = {
#define X(name, n)                                                                  \
  {entry<Opcode::name, n, 0>, entry<Opcode::name, n, 1>, entry<Opcode::name, n, 2>, \
   entry<Opcode::name, n, 3>, entry<Opcode::name, n, 4>, entry<Opcode::name, n, 5>, \
   entry<Opcode::name, n, 6>, entry<Opcode::name, n, 7>},
      METAFAST_POINTWISE_OPCODES(X)
#undef X
  };
  static Loop<T> find(Opcode op, int fixed) { return of[static_cast<int>(op)][fixed]; }
};

template <class T>
void copy(T* dst, const View<T>& from, int64_t n) {
  Loops<T>::find(Opcode::copy, from.step == 0)(dst, from, from, from, n, 1);
}

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
// memory. Where the last dimension is a vector of `lanes`, an operand may repeat it along the one before.
struct Space {
  int rank = 0;
  int64_t dims[kMaxRank], strides[kMaxOperands][kMaxRank];
  bool repeats[kMaxOperands] = {};
  bool any_repeats = false;
  int operands;
  int64_t elements = 1;

  Space(const Program& p, int64_t lanes) : operands(static_cast<int>(p.n_in + p.n_out)) {
    int order[kMaxRank];
    const int count = outermost_first(p, order);
    for (int k = 0; k < count; ++k) append(p, order[k], k == count - 1 && p.dims[order[k]] == lanes);
    if (rank == 0) {
      rank = 1, dims[0] = 1;
      for (int o = 0; o < operands; ++o) strides[o][0] = 1;
    }
  }

  int64_t inner() const { return dims[rank - 1]; }

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

  void append(const Program& p, int d, bool vector) {
    const auto stride = [&](int o) { return p.strides[o * p.rank + d]; };
    const auto follows = [&](int o) { return strides[o][rank - 1] == stride(o) * p.dims[d]; };
    bool merges = rank > 0;
    for (int o = 0; merges && o < operands; ++o)
      merges = follows(o) || (vector && may_repeat(p, o, stride(o)));
    for (int o = 0; merges && o < operands; ++o) any_repeats |= repeats[o] = !follows(o);
    if (merges)
      dims[rank - 1] *= p.dims[d];
    else
      dims[rank++] = p.dims[d];
    for (int o = 0; o < operands; ++o) strides[o][rank - 1] = stride(o);
  }

  // An input, or a sum over all but the vector.
  bool may_repeat(const Program& p, int o, int64_t stride) const {
    if (stride != 1 || strides[o][rank - 1] != 0) return false;
    if (o < p.n_in) return true;
    bool outer_zero = (p.out_mode[o - p.n_in] & kSum) != 0;
    for (int d = 0; d < rank; ++d) outer_zero &= strides[o][d] == 0;
    return outer_zero;
  }
};

enum class Source : int32_t {
  direct,     // the operand's own memory
  pitched,    // the same, its rows a pitch apart (0: the same in every row)
  rows,       // gathered for every block
  repeated,   // gathered once: the same in every row
  splat,      // one element for all; from here on a vector that is the same all along a row
  row_splat,  // one element a row
  vectors,    // one element a row, of the several rows of a block
  vector      // one vector a row, again and again
};

// What a call is, decoded: read by every call, written once. The arrays lie behind it, in this order.
template <class T>
struct alignas(64) Plan {
  struct Op {
    Loop<T> run;
    int32_t dst, a, b, c;  // views: the registers, then the immediates
    bool by_rows;          // reads an input whose rows do not lie one after the other
  };
  struct Input {
    Source source;
    int64_t inner_stride, pitch;  // pitch: between rows, where it is the same for all
    const int64_t* strides;
  };
  struct Output {
    int32_t reg, mode;
    uint32_t read_late;  // inputs that an operation still reads after the output's register was written
    bool contiguous, in_place;
    bool lanes;  // a sum that keeps the lanes of a vector apart
    int64_t inner_stride, sum_elements;
    const int64_t* strides;
  };

  int32_t n_in, n_out, n_ops, n_regs, n_immediates, rank;
  bool empty, by_rows, adds_up;  // by_rows: a block holds whole rows, not a piece of one
  int64_t block, inner, elements, rows;
  const T* immediates;  // a vector each
  const int64_t *dims, *strides;
  const Op* ops;
  const Input* inputs;
  const Output* outputs;

  static constexpr int64_t kVector = kLanes<T> * static_cast<int64_t>(sizeof(T));
  static int64_t bytes(const Program& p) {
    const int64_t operands = p.n_in + p.n_out;
    return static_cast<int64_t>(sizeof(Plan)) + p.immediates() * kVector +
           (kMaxRank + operands * kMaxRank) * static_cast<int64_t>(sizeof(int64_t)) +
           p.n_ops * static_cast<int64_t>(sizeof(Op)) + p.n_in * static_cast<int64_t>(sizeof(Input)) +
           p.n_out * static_cast<int64_t>(sizeof(Output));
  }

  static void write(const int64_t* ints, const double* f, std::byte* place) {
    const Program p(ints);
    Plan& plan = *reinterpret_cast<Plan*>(place);
    plan.empty = false;
    for (int64_t d = 0; d < p.rank; ++d) plan.empty |= p.dims[d] == 0;
    const Space s(p, kLanes<T>);
    plan.n_in = static_cast<int32_t>(p.n_in), plan.n_out = static_cast<int32_t>(p.n_out);
    plan.n_ops = static_cast<int32_t>(p.n_ops), plan.n_regs = static_cast<int32_t>(p.n_regs);
    plan.n_immediates = static_cast<int32_t>(p.immediates()), plan.rank = s.rank;
    plan.adds_up = p.sums();
    plan.block = block_elements<T>(p.n_regs), plan.inner = s.inner(), plan.elements = s.elements;
    plan.rows = plan.empty ? 0 : s.elements / s.inner();
    plan.by_rows = s.rank > 1 && 2 * s.inner() <= plan.block && !s.any_repeats;
    std::byte* at = place + sizeof(Plan);
    T* immediates = take<T>(at, plan.n_immediates * kLanes<T>);
    int64_t* dims = take<int64_t>(at, s.rank);
    int64_t* strides = take<int64_t>(at, s.operands * s.rank);
    Op* ops = take<Op>(at, p.n_ops);
    Input* inputs = take<Input>(at, p.n_in);
    Output* outputs = take<Output>(at, p.n_out);
    plan.immediates = immediates, plan.dims = dims, plan.strides = strides;
    plan.ops = ops, plan.inputs = inputs, plan.outputs = outputs;
    for (int64_t k = 0; k < plan.n_immediates; ++k)
      store(immediates + k * kLanes<T>, splat(static_cast<T>(f[k])));
    for (int d = 0; d < s.rank; ++d) dims[d] = s.dims[d];
    for (int o = 0; o < s.operands; ++o)
      for (int d = 0; d < s.rank; ++d) strides[o * s.rank + d] = s.strides[o][d];
    for (int o = 0; o < plan.n_in; ++o)
      inputs[o] = {source(p, s, o, plan.by_rows), s.strides[o][s.rank - 1], pitch(s, o),
                   strides + o * s.rank};
    for (int64_t k = 0; k < p.n_ops; ++k) ops[k] = decode(p, p.ops + 5 * k, inputs);
    for (int o = 0; o < plan.n_out; ++o) outputs[o] = output(p, s, o, plan.by_rows, strides);
  }

  // Offset of row `row` (all dimensions but the last) of an operand.
  int64_t row_offset(const int64_t* stride, int64_t row) const {
    int64_t offset = 0;
    for (int d = rank - 2; d > 0; --d) {
      offset += row % dims[d] * stride[d];
      row /= dims[d];
    }
    return rank > 1 ? offset + row * stride[0] : 0;
  }

 private:
  template <class U>
  static U* take(std::byte*& at, int64_t count) {
    U* const taken = reinterpret_cast<U*>(at);
    at += count * static_cast<int64_t>(sizeof(U));
    return taken;
  }

  static Op decode(const Program& p, const int64_t* op, const Input* inputs) {
    const int arity = OpcodeArity::of[op[0]];
    bool by_rows = false;
    int fixed = 0;
    int32_t views[3] = {0, 0, 0};
    for (int j = 0; j < arity; ++j) {
      const int64_t r = op[2 + j];
      views[j] = static_cast<int32_t>(r >= 0 ? r : p.n_regs - 1 - r);
      if (r < 0) fixed |= 1 << j;
      if (r < 0 || r >= p.n_in) continue;
      if (inputs[r].source >= Source::splat) fixed |= 1 << j;
      by_rows |= inputs[r].source == Source::pitched || inputs[r].source == Source::vectors;
    }
    const Loop<T> run = Loops<T>::find(static_cast<Opcode>(op[0]), fixed);
    return {run, static_cast<int32_t>(op[1]), views[0], views[1], views[2], by_rows};
  }

  // From row to row, or -1 where that differs.
  static int64_t pitch(const Space& s, int o) {
    if (s.rank < 2) return 0;
    for (int d = 0; d + 2 < s.rank; ++d)
      if (s.strides[o][d] != s.strides[o][d + 1] * s.dims[d + 1]) return -1;
    return s.strides[o][s.rank - 2];
  }

  // Whether loops walk the rows of an input where they are: rows long enough, and only operations read them.
  static bool walked(const Program& p, const Space& s, int o) {
    if (s.inner() < kWalkedVectors * kLanes<T> || pitch(s, o) < 0) return false;
    for (int out = 0; out < p.n_out; ++out)
      if (p.out_reg[out] == o) return false;
    return true;
  }

  static Source source(const Program& p, const Space& s, int o, bool by_rows) {
    bool outer_zero = true;
    for (int d = 0; d + 1 < s.rank; ++d) outer_zero &= s.strides[o][d] == 0;
    const int64_t inner_stride = s.strides[o][s.rank - 1];
    if (s.repeats[o]) return Source::vector;
    if (inner_stride == 0 && outer_zero) return Source::splat;
    if (by_rows ? s.dense(o) : inner_stride == 1) return Source::direct;
    if (!by_rows && inner_stride == 0) return Source::row_splat;
    if (by_rows && (inner_stride == 0 || inner_stride == 1) && walked(p, s, o))
      return inner_stride == 1 ? Source::pitched : Source::vectors;
    return by_rows && outer_zero ? Source::repeated : Source::rows;
  }

  // The register of an output may live in the output's memory unless another output claims the register (or
  // an operation after its first write still reads an input that lies there: read_late).
  static Output output(const Program& p, const Space& s, int o, bool by_rows, const int64_t* strides) {
    const int operand = static_cast<int>(p.n_in) + o;
    const int64_t reg = p.out_reg[o], inner_stride = s.strides[operand][s.rank - 1];
    const bool contiguous = by_rows ? s.dense(operand) : inner_stride == 1;
    bool in_place = contiguous && p.out_mode[o] == 0 && reg >= p.n_in;
    for (int other = 0; other < o; ++other) in_place &= p.out_reg[other] != reg;
    uint32_t read_late = 0;
    for (int in = 0; in < p.n_in; ++in)
      if (read_after_write(p, in, reg)) read_late |= uint32_t{1} << in;
    const bool lanes = s.repeats[operand];
    const int64_t kept = inner_stride && !lanes ? s.inner() : kLanes<T>;
    const int64_t sum_elements = p.out_mode[o] & kSum ? kept : 0;
    return {static_cast<int32_t>(reg),
            static_cast<int32_t>(p.out_mode[o]),
            read_late,
            contiguous,
            in_place,
            lanes,
            inner_stride,
            sum_elements,
            strides + operand * s.rank};
  }

  static bool read_after_write(const Program& p, int in, int64_t reg) {
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
};

// Copies rows row0.. of an operand, one after the other, to dst (which has a vector of slack behind it).
template <class T>
void gather_rows(T* dst, const T* base, const Plan<T>& p, const typename Plan<T>::Input& in, int64_t row0,
                 int64_t rows) {
  constexpr int L = kLanes<T>;
  const int64_t inner = p.inner, stride = in.inner_stride;
  for (int64_t r = row0; r < row0 + rows; ++r, dst += inner) {
    const T* src = base + p.row_offset(in.strides, r);
    if (stride == 0) {
      for (int64_t k = 0; k < inner; k += L) store(dst + k, splat(*src));
    } else if (stride == 1) {
      int64_t k = 0;
      for (; k + L <= inner; k += L) store(dst + k, load(src + k));
      if (k < inner) store(dst + k, load(src + k, Mask<T>(inner - k)));
    } else {
      for (int64_t k = 0; k < inner; ++k) dst[k] = src[k * stride];
    }
  }
}

template <class T>
void scatter_rows(T* base, const T* src, const Plan<T>& p, const typename Plan<T>::Output& out, int64_t row0,
                  int64_t rows, bool add) {
  const int64_t inner = p.inner, stride = out.inner_stride;
  for (int64_t r = row0; r < row0 + rows; ++r, src += inner) {
    T* y = base + p.row_offset(out.strides, r);
    for (int64_t k = 0; k < inner; ++k) y[k * stride] = add ? y[k * stride] + src[k] : src[k];
  }
}

// One call of a plan. Scratch: a block and a vector for each register and one more, then the partial sums and
// totals of the outputs that add up.
template <class T>
struct Interpreter {
  static constexpr int L = kLanes<T>;
  const Plan<T>& p;
  const Args& args;
  View<T> views[kMaxRegs + kMaxRegs];  // registers, then immediates
  bool in_place[kMaxOperands];         // per output: its register is the output's memory
  T* sums[kMaxOperands];
  int64_t unflushed = 0;
  bool flushed = false;

  Interpreter(const Plan<T>& plan, const Args& a) : p(plan), args(a) {
    for (int k = 0; k < p.n_immediates; ++k)
      views[p.n_regs + k] = {const_cast<T*>(p.immediates) + k * L, 0, 0};
    for (int r = p.n_in; r < p.n_regs; ++r) views[r] = {buffer(r), L, p.inner};
    for (int o = 0; o < p.n_in; ++o) prepare_input(o);
    for (int o = 0; o < p.n_out; ++o) in_place[o] = p.outputs[o].in_place && !overwrites(o);
    if (p.adds_up) clear_sums();
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

  void clear_sums() {
    T* after = buffer(p.n_regs + 1);
    for (int o = 0; o < p.n_out; ++o) {
      if (!(p.outputs[o].mode & kSum)) continue;
      const int64_t elements = 2 * (p.outputs[o].sum_elements + L);
      sums[o] = after;
      for (int64_t k = 0; k < elements; ++k) after[k] = 0;
      after += elements;
    }
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
    if (p.adds_up && ++unflushed == kFlushBlocks) flush();
  }

  // Adds a block to the partial sums of output o: by columns where the last dimension is kept, else by lanes.
  void add_to_sum(int o, int64_t at, int64_t n, int64_t rows) {
    const View<T> value = views[p.outputs[o].reg];
    if (p.outputs[o].inner_stride == 0 || p.outputs[o].lanes) {
      Vec<T> total = load(sums[o]);
      const T* src = value.p;
      for (int64_t k = n / L; k > 0; --k, src += value.step) total = total + load(src);
      if (n % L) total = total + keep<T>(load(src, Mask<T>(n % L)), Mask<T>(n % L));
      store(sums[o], total);
      return;
    }
    const T* src = value.p;
    if (value.step == 0) {
      copy(buffer(p.n_regs), value, n);
      src = buffer(p.n_regs);
    }
    const int64_t width = p.by_rows ? p.inner : n;
    T* to = sums[o] + (p.by_rows ? 0 : at);
    for_run<T>(width, [&](auto get, auto put) {
      Vec<T> total = get(to);
      for (int64_t r = 0; r < rows; ++r) total = total + get(src + r * width);
      put(to, total);
    });
  }

  void flush() {
    for (int o = 0; o < p.n_out; ++o) {
      if (!(p.outputs[o].mode & kSum)) continue;
      T *partial = sums[o], *total = partial + p.outputs[o].sum_elements + L;
      for (int64_t k = 0; k < p.outputs[o].sum_elements; ++k) total[k] += partial[k], partial[k] = 0;
    }
    unflushed = 0, flushed = true;
  }

  void write_sums() {
    if (flushed) flush();
    for (int o = 0; o < p.n_out; ++o) {
      const auto& out = p.outputs[o];
      if (!(out.mode & kSum)) continue;
      const T* total = sums[o] + (flushed ? out.sum_elements + L : 0);
      const bool add = out.mode & 1, columns = out.inner_stride != 0;
      T* y = out_pointer(o);
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

  // A sum is one part's work: its order must not depend on the number of parts.
  void run() {
    if (p.adds_up && args.part > 0) return;
    run_share(p.adds_up ? 1 : args.parts);
    if (p.adds_up) write_sums();
  }

  void run_share(int parts) {
    if (parts == 1 && p.rows == 1 && p.inner <= p.block) return run_block(0, 0, p.inner);
    if (p.by_rows) {
      const int64_t per_block = p.block / p.inner;
      const Range mine = share(p.rows, args.part, parts, per_block);
      for (int64_t row = mine.begin; row < mine.end; row += per_block)
        run_block(row, 0, min64(per_block, mine.end - row) * p.inner);
      return;
    }
    const int64_t pieces = (p.inner + p.block - 1) / p.block;
    const Range mine = share(p.rows * pieces, args.part, parts);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const int64_t row = b / pieces, at = b % pieces * p.block;
      run_block(row, at, min64(p.block, p.inner - at));
    }
  }
};

// A sum of nothing is 0.
template <class T>
void clear_sums_of_nothing(const Plan<T>& p, const Args& a) {
  for (int o = 0; a.part == 0 && o < p.n_out; ++o) {
    const auto& out = p.outputs[o];
    const int64_t kept = out.lanes ? kLanes<T> : out.inner_stride ? p.inner : 1;
    T* y = static_cast<T*>(a.ptr[p.n_in + o]);
    for (int64_t k = 0; out.mode == kSum && k < kept; ++k) y[k] = 0;
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
  if (plan.empty)
    clear_sums_of_nothing(plan, a);
  else
    Interpreter<T>(plan, a).run();
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
