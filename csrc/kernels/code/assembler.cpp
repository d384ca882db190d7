#include "assembler.hpp"

#include <type_traits>

namespace metafast::kernels::code {
namespace {

constexpr int bit(int value, int n) { return value >> n & 1; }

}  // namespace

void Assembler::word(int32_t value) {
  for (int k = 0; k < 4; ++k) byte(static_cast<int>(static_cast<uint32_t>(value) >> 8 * k & 0xff));
}

template <class Operand>
void Assembler::encode(VectorOp op, int reg, int v, Lanes lanes, const Operand& rm) {
  int x = 0, b = 0;
  if constexpr (std::is_same_v<Operand, Register>)
    x = bit(rm.number, 4), b = bit(rm.number, 3);
  else
    x = rm.index < 0 ? 0 : bit(rm.index, 3), b = bit(rm.base, 3);
  if (evex_)
    evex(op, reg, v, x, b, lanes);
  else
    vex(op, reg, v, x, b, op.map > 1 && f64_);
  byte(op.opcode);
  operand(reg, rm);
}

void Assembler::vector(VectorOp op, int dst, int a, int b, Lanes lanes) {
  encode(op, dst, a, lanes, Register{b});
}

void Assembler::vector(VectorOp op, int dst, int a, const Memory& b, Lanes lanes) {
  encode(op, dst, a, lanes, b);
}

void Assembler::vex(VectorOp op, int reg, int v, int x, int b, bool wide) {
  const int prefix = op.always66 || f64_ ? 1 : 0;
  byte(0xc4);
  byte((!bit(reg, 3)) << 7 | (!x) << 6 | (!b) << 5 | op.map);
  byte(wide << 7 | (~v & 15) << 3 | 1 << 2 | prefix);
}

void Assembler::evex(VectorOp op, int reg, int v, int x, int b, Lanes lanes) {
  const int prefix = op.always66 || f64_ ? 1 : 0;
  byte(0x62);
  byte((!bit(reg, 3)) << 7 | (!x) << 6 | (!b) << 5 | (!bit(reg, 4)) << 4 | op.map);
  byte(f64_ << 7 | (~v & 15) << 3 | 1 << 2 | prefix);
  byte(lanes.zero << 7 | 2 << 5 | (!bit(v, 4)) << 3 | lanes.mask);
}

// A displacement of one byte, which EVEX scales, is only ever 0.
void Assembler::operand(int reg, const Memory& m) {
  const bool indexed = m.index >= 0, far = m.displacement != 0;
  byte((far ? 2 : 1) << 6 | (reg & 7) << 3 | (indexed || (m.base & 7) == rsp ? 4 : m.base & 7));
  if (indexed || (m.base & 7) == rsp) byte((indexed ? m.index & 7 : 4) << 3 | (m.base & 7));
  if (far)
    word(m.displacement);
  else
    byte(0);
}

void Assembler::compare(Predicate predicate, int dst, int a, int b) {
  vector(op::compare, dst, a, b);
  byte(predicate);
}

void Assembler::blend(int dst, int otherwise, int chosen, int mask) {
  const VectorOp op{static_cast<uint8_t>(f64_ ? 0x4b : 0x4a), 3, true};
  vex(op, dst, otherwise, 0, bit(chosen, 3), false);
  byte(op.opcode);
  operand(dst, Register{chosen});
  byte(mask << 4);
}

void Assembler::broadcast(int dst, const Memory& element) {
  const VectorOp op{static_cast<uint8_t>(f64_ ? 0x19 : 0x18), 2, true};
  const int x = element.index < 0 ? 0 : bit(element.index, 3), b = bit(element.base, 3);
  if (evex_)
    evex(op, dst, 0, x, b, {});
  else
    vex(op, dst, 0, x, b, false);
  byte(op.opcode);
  operand(dst, element);
}

void Assembler::prefetch(const Memory& m) {
  byte(0x40 | (m.index < 0 ? 0 : bit(m.index, 3)) << 1 | bit(m.base, 3));
  byte(0x0f), byte(0x18);
  operand(1, m);
}

void Assembler::mask_from(int mask, Gpr bits) {
  for (const int b : {0xc5, 0xf8, 0x92}) byte(b);
  operand(mask, Register{bits});
}

void Assembler::integer(int opcode, Gpr reg, Gpr rm) {
  byte(0x48 | bit(reg, 3) << 2 | bit(rm, 3));
  byte(opcode);
  operand(reg, Register{rm});
}

void Assembler::integer(int opcode, Gpr reg, const Memory& rm) {
  byte(0x48 | bit(reg, 3) << 2 | (rm.index < 0 ? 0 : bit(rm.index, 3)) << 1 | bit(rm.base, 3));
  byte(opcode);
  operand(reg, rm);
}

void Assembler::add(Gpr dst, int32_t what) {
  integer(0x81, static_cast<Gpr>(0), dst);
  word(what);
}

void Assembler::add(const Memory& dst, int32_t what) {
  integer(0x81, static_cast<Gpr>(0), dst);
  word(what);
}

void Assembler::decrement(Gpr dst) { integer(0xff, static_cast<Gpr>(1), dst); }

void Assembler::push(Gpr reg) {
  if (reg >= r8) byte(0x41);
  byte(0x50 | (reg & 7));
}

void Assembler::pop(Gpr reg) {
  if (reg >= r8) byte(0x41);
  byte(0x58 | (reg & 7));
}

void Assembler::leave() {
  for (const int b : {0xc5, 0xf8, 0x77, 0xc3}) byte(b);
}

void Assembler::jump_back(Condition condition, int64_t to) {
  byte(0x0f), byte(condition);
  word(static_cast<int32_t>(to - (here() + 4)));
}

int64_t Assembler::jump_ahead(Condition condition) {
  byte(0x0f), byte(condition);
  word(0);
  return here();
}

void Assembler::land(int64_t jump) {
  const auto distance = static_cast<uint32_t>(here() - jump);
  for (int k = 0; k < 4; ++k) bytes_[jump - 4 + k] = static_cast<uint8_t>(distance >> 8 * k);
}

}  // namespace metafast::kernels::code
