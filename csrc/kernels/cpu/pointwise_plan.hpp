// What a call of `pointwise` is, decoded once: its space, where its operands come from, its operations. Part of
// pointwise.cpp.
#pragma once
#include "../code/cluster.hpp"
#include "pointwise.hpp"
#include "pointwise_loops.hpp"

namespace metafast::kernels::METAFAST_ISA {
namespace {

constexpr int kMaxRank = kPointwiseRank, kMaxOperands = kPointwiseOperands, kMaxRegs = kPointwiseRegisters,
              kMaxOps = kPointwiseOps;

constexpr int64_t kSum = 2;            // bit of an output mode: add up over the dimensions of stride 0
constexpr int64_t kFlushBlocks = 64;   // partial sums of so many blocks go into the total at once
constexpr int64_t kWalkedVectors = 2;  // shorter rows of inputs are gathered rather than walked
constexpr int64_t kShortStrip = 128;   // elements times operations: from here on code is faster
constexpr int64_t kShortRow = 12;      // the same of a row that ends within a vector, in one strip

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

  bool compiled() const { return ops[5 * n_ops] != 0; }

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

  // Elements of output o that are kept apart, a vector of slack included, and those of all groups.
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
  code::Code code;  // what does all operations in one pass; or null, and the interpreter does them
  int64_t block, inner, elements, rows;
  int64_t
      groups;  // of rows that are added up each by itself: the outermost dimension, where all sums keep it
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
    plan.groups = s.rank > 1 && keep_outermost(p, s) ? s.dims[0] : 1;
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
    plan.code = nullptr;
    if (p.compiled() && !plan.empty && !short_strips(p, s)) plan.compile(p, s);
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

  // Calls visit(offset, step, count) for runs of rows that are `step` apart in an operand.
  template <class Visit>
  METAFAST_INLINE void each_run(const int64_t* stride, int64_t row, int64_t rows, Visit visit) const {
    const int64_t length = rank > 1 ? dims[rank - 2] : 1, step = rank > 1 ? stride[rank - 2] : 0;
    for (const int64_t end = row + rows; row < end;) {
      const int64_t count = min64(end - row, length - row % length);
      visit(row_offset(stride, row), step, count);
      row += count;
    }
  }

 private:
  template <class U>
  static U* take(std::byte*& at, int64_t count) {
    U* const taken = reinterpret_cast<U*>(at);
    at += count * static_cast<int64_t>(sizeof(U));
    return taken;
  }

  // Whether to set up a strip of rows takes longer than what is done there, so that blocks of gathered rows are faster;
  // or one vector for a row does, of which little is used.
  static bool short_strips(const Program& p, const Space& s) {
    const int64_t row = s.inner() * max64(p.n_ops, 1);
    if (s.rank <= 2) return s.rank == 2 && s.inner() % kLanes<T> != 0 && row < kShortRow;
    return s.dims[s.rank - 2] * row < kShortStrip;
  }

  // Makes code of the cluster, where all that it streams lies element by element.
  void compile(const Program& p, const Space& s) {
    constexpr auto isa = kVecBytes == 64 ? Isa::avx512 : kVecBytes == 32 ? Isa::avx2 : Isa::baseline;
    code::Cluster c{isa,
                    sizeof(T) == 4 ? DType::f32 : DType::f64,
                    n_in,
                    n_out,
                    n_ops,
                    n_regs,
                    n_immediates,
                    inner % kLanes<T> != 0,
                    elements * static_cast<int64_t>(sizeof(T)) >= kLargeBytes,
                    p.ops,
                    p.out_reg,
                    {},
                    {},
                    {}};
    for (int o = 0; o < s.operands; ++o) {
      const int64_t inner_stride = s.strides[o][rank - 1];
      if (inner_stride != 0 && inner_stride != 1) return;
      if (o < n_in)
        c.in[o] = s.repeats[o]   ? code::Input::vector
                  : inner_stride ? code::Input::stream
                                 : code::Input::splat;
      else
        c.out[o - n_in] = compiled_output(p, s, o - n_in);
      const bool sum = o >= n_in && (p.out_mode[o - n_in] & kSum);
      c.pitch[o] = rank > 1 && !sum ? s.strides[o][rank - 2] * static_cast<int64_t>(sizeof(T)) : 0;
    }
    code = code::compile(c);
  }

  // A sum over rows is added to a row of partial sums.
  static code::Output compiled_output(const Program& p, const Space& s, int o) {
    const int operand = static_cast<int>(p.n_in) + o;
    const bool one_vector = s.repeats[operand] || s.strides[operand][s.rank - 1] == 0;
    if ((p.out_mode[o] & kSum) && one_vector) return code::Output::total;
    return p.out_mode[o] ? code::Output::add : code::Output::store;
  }

  static bool keep_outermost(const Program& p, const Space& s) {
    bool keep = p.sums();
    for (int64_t o = 0; o < p.n_out; ++o) keep &= !(p.out_mode[o] & kSum) || s.strides[p.n_in + o][0] != 0;
    return keep;
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

}  // namespace
}  // namespace metafast::kernels::METAFAST_ISA
