#include "cluster.hpp"

#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

#include "../common/kernels.hpp"
#include "../common/opcodes.hpp"
#include "assembler.hpp"
#include "memory.hpp"

namespace metafast::kernels::code {
namespace {

#if defined(METAFAST_X86_SETS)
constexpr bool kX86 = true;
#else
constexpr bool kX86 = false;
#endif

constexpr int kCondition = 1, kRest = 2;  // mask registers
constexpr Gpr kGeneral[] = {r8, r9, r10, r11, rbx, rbp, r12, r13, r14, r15};
constexpr int kFirstSaved = 4;  // of those the caller's
constexpr int kGeneralCount = sizeof kGeneral / sizeof kGeneral[0];

Memory field(size_t offset) { return {rdi, -1, static_cast<int32_t>(offset)}; }
Memory address_field(int operand) { return field(offsetof(Strip, at) + sizeof(void*) * operand); }

int arity(const int64_t* op) { return pointwise_opcode_arity(static_cast<int>(op[0])); }

// Thrown where a cluster has no code.
struct Impossible {};

// Vector registers: some hold one thing all along, the others the values of one step of the loop.
class Registers {
 public:
  explicit Registers(int count) : free_(count == 32 ? ~uint32_t{0} : (uint32_t{1} << count) - 1) {}

  int take() {
    if (!free_) throw Impossible();
    const int found = __builtin_ctz(free_);
    free_ &= free_ - 1;
    return found;
  }
  void give_back(int reg) { free_ |= uint32_t{1} << reg; }

 private:
  uint32_t free_;
};

class Writer {
 public:
  explicit Writer(const Cluster& cluster)
      : c_(cluster), a_(cluster.isa, cluster.dtype), registers_(a_.registers()), at_(c_.n_regs, -1) {}

  std::vector<uint8_t> write() {
    assign_addresses();
    for (int k = kFirstSaved; k < taken_; ++k) a_.push(kGeneral[k]);
    load_constants();
    a_.load(rdx, field(offsetof(Strip, whole)));
    walk();
    for (int o = 0; o < c_.n_out; ++o)
      if (c_.out[o] == Output::total) {
        a_.load(rax, address_field(c_.n_in + o));
        a_.vector(op::store, totals_[o], 0, Memory{rax});
      }
    for (int k = taken_; k-- > kFirstSaved;) a_.pop(kGeneral[k]);
    a_.leave();
    return a_.bytes();
  }

 private:
  // ---- operands

  int operands() const { return c_.n_in + c_.n_out; }

  // Whether it goes on from vector to vector.
  bool streams(int operand) const {
    return operand < c_.n_in ? c_.in[operand] == Input::stream : c_.out[operand - c_.n_in] != Output::total;
  }

  // The first few streams have their address in a register.
  void assign_addresses() {
    for (int o = 0; o < operands(); ++o) {
      if (c_.pitch[o] != static_cast<int32_t>(c_.pitch[o])) throw Impossible();
      addresses_.push_back(streams(o) && taken_ < kGeneralCount ? kGeneral[taken_++] : -1);
    }
  }

  Memory element(int operand) {
    int base = addresses_[operand];
    if (base < 0) a_.load(static_cast<Gpr>(base = rax), address_field(operand));
    return {static_cast<Gpr>(base), streams(operand) ? rsi : -1};
  }

  void fetch_ahead(int operand) {
    Memory place = element(operand);
    place.displacement = kAheadBytes;
    a_.prefetch(place);
  }

  void advance(int operand, int64_t bytes) {
    if (bytes == 0) return;
    if (addresses_[operand] >= 0)
      a_.add(static_cast<Gpr>(addresses_[operand]), static_cast<int32_t>(bytes));
    else
      a_.add(address_field(operand), static_cast<int32_t>(bytes));
  }

  int constant(std::optional<int>& held, size_t offset) {
    if (!held) a_.broadcast(*(held = registers_.take()), field(offset));
    return *held;
  }

  // What no step of the loop changes.
  void load_constants() {
    for (int k = 0; k < c_.n_ops; ++k) need(static_cast<Opcode>(c_.ops[5 * k]));
    if (c_.n_immediates) a_.load(rax, field(offsetof(Strip, immediates)));
    for (int k = 0; k < c_.n_immediates; ++k) {
      immediates_.push_back(registers_.take());
      a_.vector(op::load, immediates_.back(), 0, Memory{rax, -1, k * a_.vector_bytes()});
    }
    for (int o = 0; o < c_.n_in; ++o)
      if (!streams(o)) at_[o] = registers_.take();
    for (int o = 0; o < c_.n_out; ++o) {
      totals_.push_back(c_.out[o] == Output::total ? registers_.take() : -1);
      if (totals_[o] < 0) continue;
      a_.load(rax, address_field(c_.n_in + o));
      a_.vector(op::load, totals_[o], 0, Memory{rax});
    }
    for (int o = 0; o < operands(); ++o)
      if (addresses_[o] >= 0) a_.load(static_cast<Gpr>(addresses_[o]), address_field(o));
    if (c_.rest) {
      a_.load(rax, field(offsetof(Strip, rest)));
      a_.mask_from(kRest, rax);
    }
    for (int& reg : spare_) reg = registers_.take();
  }

  void need(Opcode opcode) {
    switch (opcode) {
      case Opcode::relu:
      case Opcode::where:
      case Opcode::where_positive:
        need_zero();
        break;
      case Opcode::step:
      case Opcode::sign:
        need_zero();
        [[fallthrough]];
      case Opcode::rsqrt:
      case Opcode::recip:
      case Opcode::gt:
      case Opcode::ge:
      case Opcode::lt:
      case Opcode::le:
      case Opcode::eq:
      case Opcode::ne:
        constant(one_, offsetof(Strip, one));
        break;
      case Opcode::neg:
        constant(sign_, offsetof(Strip, sign));
        break;
      case Opcode::abs:
        constant(magnitude_, offsetof(Strip, magnitude));
        break;
      default:
        break;
    }
    if (opcode == Opcode::sign) constant(sign_, offsetof(Strip, sign));
  }

  void need_zero() {
    if (zero_) return;
    zero_ = registers_.take();
    a_.vector(op::bit_xor, *zero_, *zero_, *zero_);
  }

  // ---- the loop

  // Row after row, of each vector after vector; no whole one where a row is shorter.
  void walk() {
    a_.load(rcx, field(offsetof(Strip, rows)));
    const int64_t row = a_.here();
    read_fixed();
    a_.clear(rsi);
    a_.compare(rsi, rdx);
    const int64_t none = a_.jump_ahead(Assembler::zero);
    const int64_t vector = a_.here();
    step();
    a_.add(rsi, a_.vector_bytes());
    a_.compare(rsi, rdx);
    a_.jump_back(Assembler::below, vector);
    a_.land(none);
    if (c_.rest) {
      lanes_ = {kRest, true};
      step();
      lanes_ = {};
    }
    for (int o = 0; o < operands(); ++o) advance(o, c_.pitch[o]);
    a_.decrement(rcx);
    a_.jump_back(Assembler::not_zero, row);
  }

  // What stays the same all along a row.
  void read_fixed() {
    for (int o = 0; o < c_.n_in; ++o) {
      if (c_.in[o] == Input::splat) a_.broadcast(at_[o], element(o));
      if (c_.in[o] == Input::vector) a_.vector(op::load, at_[o], 0, element(o));
    }
  }

  // ---- one vector of a row

  void step() {
    for (int o = 0; c_.large && o < operands(); ++o)
      if (streams(o) && c_.pitch[o] != 0) fetch_ahead(o);
    for (int k = 0; k < c_.n_ops; ++k) operate(k);
    for (int o = 0; o < c_.n_out; ++o) put(o);
    for (int r = 0; r < c_.n_regs; ++r) drop(r);
  }

  int value(int64_t r) {
    if (r < 0) return immediates_[-1 - r];
    if (at_[r] >= 0) return at_[r];
    if (r >= c_.n_in) throw Impossible();  // read before it was written
    at_[r] = registers_.take();
    a_.vector(op::load, at_[r], 0, element(static_cast<int>(r)), lanes_);
    return at_[r];
  }

  bool fixed(int64_t r) const { return r < 0 || (r < c_.n_in && !streams(static_cast<int>(r))); }

  void drop(int64_t r) {
    if (fixed(r) || at_[r] < 0) return;
    registers_.give_back(at_[r]);
    at_[r] = -1;
  }

  // Whether what a register holds after operation k is still read.
  bool lives(int64_t r, int k) const {
    for (int next = k + 1; next < c_.n_ops; ++next) {
      const int64_t* o = c_.ops + 5 * next;
      for (int j = 0; j < arity(o); ++j)
        if (o[2 + j] == r) return true;
      if (o[1] == r) return false;
    }
    for (int o = 0; o < c_.n_out; ++o)
      if (c_.out_reg[o] == r) return true;
    return false;
  }

  void operate(int k) {
    const int64_t* o = c_.ops + 5 * k;
    int in[3] = {0, 0, 0};
    for (int j = 0; j < arity(o); ++j) in[j] = value(o[2 + j]);
    for (int j = 0; j < arity(o); ++j)
      if (o[2 + j] == o[1] || !lives(o[2 + j], k)) drop(o[2 + j]);
    drop(o[1]);
    at_[o[1]] = registers_.take();  // may be that of an operand, which is read before it is written
    apply(static_cast<Opcode>(o[0]), at_[o[1]], in[0], in[1], in[2]);
    if (!lives(o[1], k)) drop(o[1]);
  }

  void put(int o) {
    const int v = value(c_.out_reg[o]);
    if (totals_[o] >= 0) return a_.vector(op::add, totals_[o], totals_[o], v, {lanes_.mask, false});
    int made = v;
    const Memory place = element(c_.n_in + o);
    if (c_.out[o] == Output::add) {
      made = spare_[0];
      a_.vector(op::load, made, 0, place, lanes_);
      a_.vector(op::add, made, made, v);
    }
    a_.vector(op::store, made, 0, place, {lanes_.mask, false});
  }

  // ---- operations, as `apply` of pointwise_loops.hpp defines them

  void apply(Opcode opcode, int dst, int a, int b, int c) {
    switch (opcode) {
      case Opcode::copy:
        return a_.vector(op::move, dst, 0, a);
      case Opcode::add:
        return a_.vector(op::add, dst, a, b);
      case Opcode::sub:
        return a_.vector(op::sub, dst, a, b);
      case Opcode::mul:
        return a_.vector(op::mul, dst, a, b);
      case Opcode::div:
        return a_.vector(op::div, dst, a, b);
      case Opcode::square:
        return a_.vector(op::mul, dst, a, a);
      case Opcode::sqrt:
        return a_.vector(op::sqrt, dst, 0, a);
      case Opcode::recip:
        return a_.vector(op::div, dst, *one_, a);
      case Opcode::rsqrt:
        a_.vector(op::sqrt, spare_[0], 0, a);
        return a_.vector(op::div, dst, *one_, spare_[0]);
      case Opcode::neg:
        return a_.vector(op::bit_xor, dst, a, *sign_);
      case Opcode::abs:
        return a_.vector(op::bit_and, dst, a, *magnitude_);
      case Opcode::fma:
        return fma(dst, a, b, c);
      case Opcode::maximum:
        return extreme(op::max, dst, a, b);
      case Opcode::minimum:
        return extreme(op::min, dst, a, b);
      case Opcode::relu:
        return where(not_less_equal, a, *zero_, dst, a, *zero_);
      case Opcode::step:
        return where(greater, a, *zero_, dst, *one_, *zero_);
      case Opcode::sign:
        return sign(dst, a);
      case Opcode::where:
        return where(not_equal, a, *zero_, dst, b, c);
      case Opcode::where_positive:
        return where(greater, a, *zero_, dst, b, c);
      case Opcode::gt:
        return truth(greater, dst, a, b);
      case Opcode::ge:
        return truth(greater_equal, dst, a, b);
      case Opcode::lt:
        return truth(less, dst, a, b);
      case Opcode::le:
        return truth(less_equal, dst, a, b);
      case Opcode::eq:
        return truth(equal, dst, a, b);
      case Opcode::ne:
        return truth(not_equal, dst, a, b);
      default:
        throw Impossible();
    }
  }

  // The instruction writes over one of its operands.
  void fma(int dst, int a, int b, int c) {
    if (dst == a) return a_.vector(op::fma213, dst, b, c);
    if (dst == b) return a_.vector(op::fma213, dst, a, c);
    if (dst != c) a_.vector(op::move, dst, 0, c);
    a_.vector(op::fma231, dst, a, b);
  }

  // dst = x ? y ? chosen : otherwise, for a comparison ? of x and y.
  void where(Predicate predicate, int x, int y, int dst, int chosen, int otherwise) {
    if (a_.evex()) {
      a_.compare(predicate, kCondition, x, y);
      return a_.vector(op::choose, dst, otherwise, chosen, {kCondition, false});
    }
    a_.compare(predicate, spare_[1], x, y);
    if (otherwise == zero_) return a_.vector(op::bit_and, dst, spare_[1], chosen);
    a_.blend(dst, otherwise, chosen, spare_[1]);
  }

  // 1 or 0.
  void truth(Predicate predicate, int dst, int x, int y) {
    if (!a_.evex()) {
      a_.compare(predicate, spare_[1], x, y);
      return a_.vector(op::bit_and, dst, spare_[1], *one_);
    }
    a_.compare(predicate, kCondition, x, y);
    a_.vector(op::move, dst, 0, *one_, {kCondition, true});
  }

  // max and min give their second operand where either is NaN; wanted is NaN then.
  void extreme(VectorOp which, int dst, int a, int b) {
    a_.vector(which, spare_[0], a, b);
    where(unordered, a, a, dst, a, spare_[0]);
  }

  // 1 with the sign of a, and 0 of 0 and of NaN.
  void sign(int dst, int a) {
    a_.vector(op::bit_and, spare_[0], a, *sign_);
    a_.vector(op::bit_or, spare_[0], spare_[0], *one_);
    a_.compare(equal, a_.evex() ? kCondition : spare_[1], a, a);
    if (a_.evex())
      a_.vector(op::move, spare_[0], 0, spare_[0], {kCondition, true});
    else
      a_.vector(op::bit_and, spare_[0], spare_[1], spare_[0]);
    where(not_equal, a, *zero_, dst, spare_[0], *zero_);
  }

  const Cluster& c_;
  Assembler a_;
  Registers registers_;
  Lanes lanes_;
  std::vector<int> at_;         // the vector register of each of the cluster's, or -1
  std::vector<int> addresses_;  // the general register of each operand's address, or -1
  std::vector<int> immediates_, totals_;
  std::optional<int> zero_, one_, sign_, magnitude_;
  int spare_[2];
  int taken_ = 0;  // of kGeneral
};

}  // namespace

Code compile(const Cluster& cluster) noexcept {
  if (!kX86 || cluster.isa == Isa::baseline || (cluster.rest && cluster.isa != Isa::avx512)) return nullptr;
  try {
    return reinterpret_cast<Code>(const_cast<void*>(install(Writer(cluster).write())));
  } catch (...) {  // no code: there is the interpreter
    return nullptr;
  }
}

}  // namespace metafast::kernels::code
