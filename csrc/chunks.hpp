// A run of instructions done a chunk at a time: what one of them writes of a chunk the next finds in cache, and what is
// needed nowhere else has memory for one chunk only.
//
//   chunk c = 0..count-1:  member 0, member 1, ...      operand k of a member at its address + c * its stride
//
// To the replay it is one instruction like any other, whose parts are shares of the chunks. Members write what other
// chunks neither write nor read, so neither the order of chunks nor who runs them changes a bit.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/common/kernel.hpp"

namespace metafast {

struct Chunks {
  struct Operand {
    int64_t stride;  // bytes from chunk to chunk
    int64_t local;   // where it lies in the memory of a chunk, or -1: at the address in the table of pointers
  };
  struct Member {  // as Instruction and InstructionInfo have it
    const kernels::Kernel* kernel;
    const int64_t* ints;
    const double* floats;
    const std::byte* prepared;
    int n_operands, n_ints, n_floats;
  };
  int64_t count;
  std::vector<Member> members;
  std::vector<Operand> operands;  // of all members, in their order
  int64_t memory = 0;  // of a chunk; begins so many bytes into the scratch, behind that of the kernels
};

// What replay runs: `prepared` is the Chunks.
extern const kernels::Kernel kChunksKernel;

}  // namespace metafast
