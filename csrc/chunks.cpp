#include "chunks.hpp"

namespace metafast {
namespace {

int run_chunk(const Chunks& chunks, int64_t c, const kernels::Args& a) noexcept {
  size_t next = 0;
  for (const Chunks::Member& member : chunks.members) {
    void* pointers[kernels::kMostOperands];
    for (int k = 0; k < member.n_operands; ++k, ++next) {
      const Chunks::Operand& operand = chunks.operands[next];
      std::byte* const base = operand.local < 0 ? static_cast<std::byte*>(a.ptr[next])
                                                : a.scratch + chunks.memory + operand.local;
      pointers[k] = base + c * operand.stride;
    }
    if (const int status =
            member.kernel->run({pointers, member.ints, member.floats, a.scratch, 0, 1, member.prepared}))
      return status;
  }
  return kernels::kOk;
}

int run_chunks(const kernels::Args& a) noexcept {
  const Chunks& chunks = *reinterpret_cast<const Chunks*>(a.prepared);
  for (int64_t c = chunks.count * a.part / a.parts; c < chunks.count * (a.part + 1) / a.parts; ++c)
    if (const int status = run_chunk(chunks, c, a)) return status;
  return kernels::kOk;
}

}  // namespace

const kernels::Kernel kChunksKernel{"chunks", run_chunks, nullptr, true};

}  // namespace metafast
