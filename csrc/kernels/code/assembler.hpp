// The few x86-64 instructions that clusters become: vector arithmetic in VEX (AVX2) or EVEX (AVX-512) form, and what
// walks over rows. Encodings as in the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
#pragma once
#include <cstdint>
#include <vector>

#include "../common/kernel.hpp"

namespace metafast::kernels::code {

enum Gpr : int { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 };

struct Memory {
  Gpr base;
  int index = -1;  // a Gpr, or none
  int32_t displacement = 0;
};

// Vector instructions of maps 0F, 0F38 and 0F3A: opcode, map, and whether their prefix is 66 in single precision too.
struct VectorOp {
  uint8_t opcode, map;
  bool always66 = false;
};

namespace op {
inline constexpr VectorOp load{0x10, 1}, store{0x11, 1}, move{0x28, 1}, sqrt{0x51, 1}, bit_and{0x54, 1},
    bit_or{0x56, 1}, bit_xor{0x57, 1}, add{0x58, 1}, mul{0x59, 1}, sub{0x5c, 1}, min{0x5d, 1}, div{0x5e, 1},
    max{0x5f, 1}, compare{0xc2, 1};
inline constexpr VectorOp fma213{0xa8, 2, true}, fma231{0xb8, 2, true},
    choose{0x65, 2, true};  // choose: by a mask
}  // namespace op

enum Predicate : uint8_t {
  equal = 0,
  less = 1,
  less_equal = 2,
  unordered = 3,
  not_equal = 4,
  not_less_equal = 6,
  greater_equal = 13,
  greater = 14
};

// Which lanes an instruction writes: all, those of a mask register, or those and zero elsewhere. EVEX.
struct Lanes {
  int mask = 0;
  bool zero = false;
};

class Assembler {
 public:
  Assembler(Isa isa, DType dtype) : evex_(isa == Isa::avx512), f64_(dtype == DType::f64) {}

  const std::vector<uint8_t>& bytes() const { return bytes_; }
  bool evex() const { return evex_; }
  int vector_bytes() const { return evex_ ? 64 : 32; }
  int registers() const { return evex_ ? 32 : 16; }

  // dst = a (op) b; an instruction of two operands leaves `a` out (0).
  void vector(VectorOp, int dst, int a, int b, Lanes = {});
  void vector(VectorOp, int dst, int a, const Memory& b, Lanes = {});
  void compare(Predicate, int dst, int a, int b);  // a mask register in EVEX form, else all bits of a lane
  void blend(int dst, int otherwise, int chosen, int mask);  // VEX: dst = mask ? chosen : otherwise
  void broadcast(int dst, const Memory& element);
  void mask_from(int mask, Gpr bits);  // EVEX

  void prefetch(const Memory&);
  void load(Gpr dst, const Memory& from) { integer(0x8b, dst, from); }
  void add(Gpr dst, int32_t what);
  void add(const Memory& dst, int32_t what);
  void compare(Gpr a, Gpr b) { integer(0x39, b, a); }
  void clear(Gpr dst) { integer(0x31, dst, dst); }
  void decrement(Gpr);
  void push(Gpr);
  void pop(Gpr);
  void leave();  // clears the upper halves of vectors and returns

  int64_t here() const { return static_cast<int64_t>(bytes_.size()); }
  enum Condition : uint8_t { below = 0x82, zero = 0x84, not_zero = 0x85 };
  void jump_back(Condition, int64_t to);
  int64_t jump_ahead(Condition);  // to where `land` says
  void land(int64_t jump);

 private:
  struct Register {
    int number;
  };
  void byte(int value) { bytes_.push_back(static_cast<uint8_t>(value)); }
  void word(int32_t value);
  template <class Operand>
  void encode(VectorOp, int reg, int v, Lanes, const Operand& rm);
  void vex(VectorOp, int reg, int v, int x, int b, bool wide);
  void evex(VectorOp, int reg, int v, int x, int b, Lanes);
  void operand(int reg, Register rm) { byte(0xc0 | (reg & 7) << 3 | (rm.number & 7)); }
  void operand(int reg, const Memory& m);
  void integer(int opcode, Gpr reg, Gpr rm);
  void integer(int opcode, Gpr reg, const Memory& rm);

  const bool evex_, f64_;
  std::vector<uint8_t> bytes_;
};

}  // namespace metafast::kernels::code
