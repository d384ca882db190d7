#include "frame.hpp"

#include <algorithm>
#include <new>

namespace metafast {
namespace {

template <class T>
void write(std::byte* record, int64_t k, int64_t steps, const void* weights, int64_t t, int lanes) {
  T* const values = reinterpret_cast<T*>(record);
  values[0] = static_cast<T>(k);
  values[1] = static_cast<T>(steps);
  for (int lane = 0; lane < lanes; ++lane)
    values[2 + lane] = weights ? static_cast<const T*>(weights)[t * lanes + lane] : T{1};
}

// Of sizes no machine has, rather than a number that wrapped around.
int64_t bytes_of(int64_t slots, int64_t bytes) {
  int64_t product;
  if (__builtin_mul_overflow(slots, bytes, &product) || product > INT64_MAX / 4) throw std::bad_alloc();
  return product;
}

}  // namespace

Layout::Layout(const Program& program, int64_t steps, int64_t every)
    : rolls(program.rolls_state()),
      every(every),
      shared(steps / every),
      turns(program.uses(kStateNext) ? 2 : 1) {
  int64_t at = 0;
  const auto place = [&at](int64_t size) {
    const int64_t start = at;
    at += aligned(size);
    return start;
  };
  const Sizes& sizes = program.sizes();
  state_stride = aligned(sizes.state);
  const int adjoints = program.uses(kAdjointNext) ? 2 : 1;
  adjoint_stride = adjoints == 2 ? aligned(sizes.adjoint) : 0;
  table = place(static_cast<int64_t>(program.operands().size() * sizeof(void*)));
  bases = place(static_cast<int64_t>((kExternal + program.n_external()) * sizeof(std::byte*)));
  call = place(program.record_bytes());
  scratch = place(program.scratch_bytes());
  helping = at;
  arena = place(sizes.arena);
  kept = place(program.kept_bytes());
  made = place(static_cast<int64_t>(program.kept().size()));
  adjoint = place(adjoints * aligned(sizes.adjoint));
  state = place(bytes_of(rolls ? turns : shared + every, state_stride));
  bytes = at;
}

Part::Part(const Call& call, const Portion& portion, int64_t first, int64_t lanes_before)
    : program(*portion.program),
      externals(portion.externals),
      weights(call.weights
                  ? static_cast<const std::byte*>(call.weights) + lanes_before * size_of(program.dtype())
                  : nullptr),
      layout(program, call.steps, call.every),
      first(first),
      end(first + portion.tasks),
      shares_setup(std::ranges::all_of(program.setup_externals(),
                                       [&](int j) { return externals[j].task_stride == 0; })) {}

Frame::Frame(const Part& part, std::byte* memory) noexcept
    : part_(part),
      memory_(memory),
      table_(reinterpret_cast<void**>(memory + part.layout.table)),
      bases_(reinterpret_cast<std::byte**>(memory + part.layout.bases)),
      scratch_(memory + part.layout.scratch) {
  bases_[kArena] = memory + part.layout.arena;
  bases_[kConstant] = const_cast<std::byte*>(part.program.constants());  // validated: no kernel writes there
  bases_[kCall] = memory + part.layout.call;
  bases_[kChunk] = scratch_;  // of whoever runs a part: chunks.cpp
  for (const Operand& operand : part.program.operands())
    if (!moves(operand.space)) table_[operand.slot] = bases_[operand.space] + operand.offset;
}

void Frame::forget_kept() const noexcept {
  std::fill_n(memory_ + part_.layout.made, part_.program.kept().size(), std::byte{0});
}

// Where it lies, made if it is not there yet; null where tasks or steps differ in what it is made of, or one task is all
// that would read it.
std::byte* Frame::kept(const Instruction& instruction) const noexcept {
  const Kept& wanted = part_.program.kept()[instruction.kept];
  const External& external = part_.externals[wanted.external()];
  if (external.task_stride != 0 || external.step_stride != 0 || part_.end - part_.first < 2) return nullptr;
  std::byte* const place = memory_ + part_.layout.kept + wanted.offset;
  std::byte& made = memory_[part_.layout.made + instruction.kept];
  if (made == std::byte{0})
    wanted.make({operands(instruction), instruction.ints, instruction.floats, scratch_, 0, 1,
                 instruction.prepared, place});
  made = std::byte{1};
  return place;
}

std::byte* Frame::state_slot(int64_t k) const noexcept {
  return memory_ + part_.layout.state + part_.layout.slot(k) * part_.layout.state_stride;
}

void Frame::move_to(int s, int64_t t, int64_t k, int64_t adjoints) noexcept {
  const SectionCode& code = part_.program.section(s);
  std::byte* const adjoint = memory_ + part_.layout.adjoint;
  bases_[kStateCur] = state_slot(k);
  bases_[kStateNext] = state_slot(k + 1);
  bases_[kAdjointCur] = adjoint + adjoints % 2 * part_.layout.adjoint_stride;
  bases_[kAdjointNext] = adjoint + (adjoints + 1) % 2 * part_.layout.adjoint_stride;
  for (const int j : code.externals) {
    const External& external = part_.externals[j];
    bases_[kExternal + j] =
        reinterpret_cast<std::byte*>(external.pointer + t * external.task_stride + k * external.step_stride);
  }
  for (const Operand& operand : code.moving) table_[operand.slot] = bases_[operand.space] + operand.offset;
}

void Frame::write_record(int64_t t, int64_t k, int64_t steps) noexcept {
  std::byte* const record = memory_ + part_.layout.call;
  if (part_.program.dtype() == kernels::DType::f32)
    write<float>(record, k, steps, part_.weights, t, part_.program.lanes());
  else
    write<double>(record, k, steps, part_.weights, t, part_.program.lanes());
}

}  // namespace metafast
