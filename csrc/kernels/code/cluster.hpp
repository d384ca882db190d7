// The operations of a `pointwise` call as machine code: one pass over memory, everything between in registers.
#pragma once
#include "../common/kernel.hpp"

namespace metafast::kernels::code {

// What is read for a row: its elements, one element, or one vector again and again.
enum class Input : uint8_t { stream, splat, vector };
// total: one vector, which takes up all of them.
enum class Output : uint8_t { store, add, total };

struct Cluster {
  Isa isa;
  DType dtype;
  int n_in, n_out, n_ops, n_regs, n_immediates;
  bool rest;           // rows end in the middle of a vector
  bool large;          // what it streams may come from memory, and is fetched ahead
  const int64_t* ops;  // opcode, dst, a, b, c; as in the ints of `pointwise`
  const int64_t* out_reg;
  Input in[kPointwiseOperands];
  Output out[kPointwiseOperands];
  int64_t pitch[kPointwiseOperands];  // bytes from row to row of inputs, then outputs; 0 of what adds rows up
};

// Rows that the code runs over. It moves the addresses as it goes.
struct Strip {
  int64_t rows;
  int64_t whole;                  // bytes of a row, a multiple of a vector
  uint64_t rest;                  // a bit for each element of a row beyond that
  const void* immediates;         // a vector each
  uint64_t one, sign, magnitude;  // the number 1, and the masks of bits, of one element
  void* at[kPointwiseOperands];   // inputs, then outputs
};

using Code = void (*)(Strip*);

// Null where an operation has no instruction, registers do not suffice, or the processor is another.
Code compile(const Cluster&) noexcept;

}  // namespace metafast::kernels::code
