#include "program.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace metafast {
namespace {

using kernels::Isa;

// A barrier between two threads costs some 0.2 µs: a part shorter than this is not worth one.
constexpr double kShortestPart = 1000;  // nanoseconds

// All that is kept is to be found in a cache at each task: what is beyond a worker's share of the last is as soon made.
constexpr int64_t kMostKept = int64_t{4} << 20;

constexpr std::array<std::string_view, kExternal> kSpaceNames = {"arena",       "state_cur",    "state_next",
                                                                 "adjoint_cur", "adjoint_next", "accumulator",
                                                                 "constant",    "call",         "chunk"};

bool allowed(int section, int space) {
  switch (space) {
    case kStateNext:
      return section == kInner || section == kMeta;
    case kAdjointCur:
      return section == kQuery || section == kMeta || section == kEpilogue;
    case kAdjointNext:
      return section == kMeta;
    default:
      return true;
  }
}

[[noreturn]] void reject(const std::string& message) { throw std::invalid_argument("Program: " + message); }

// No memory holds more: sums of a few sizes and offsets below it do not overflow.
constexpr int64_t kMostBytes = int64_t{1} << 47;
constexpr int64_t kMostExternals = 1 << 20;
constexpr int kMostLanes = 64;

void check_size(int64_t size, int64_t most, const char* what) {
  if (size >= 0 && size <= most) return;
  reject(std::string(what) + (size < 0 ? ": at least 0" : ": at most " + std::to_string(most)) +
         " expected, got " + std::to_string(size));
}

void check_sizes(const ProgramSpec& spec) {
  check_size(spec.sizes.arena, kMostBytes, "arena_bytes");
  check_size(spec.sizes.state, kMostBytes, "state_bytes");
  check_size(spec.sizes.adjoint, kMostBytes, "adjoint_bytes");
  check_size(spec.sizes.accumulator, kMostBytes, "accumulator_bytes");
  check_size(spec.n_external, kMostExternals, "n_external");
  if (spec.lanes < 1 || spec.lanes > kMostLanes)
    reject("lanes: 1 to " + std::to_string(kMostLanes) + " expected, got " + std::to_string(spec.lanes));
  if (spec.sizes.accumulator % size_of(spec.dtype) != 0)
    reject("accumulator_bytes: a multiple of " + std::to_string(size_of(spec.dtype)) + " expected, got " +
           std::to_string(spec.sizes.accumulator));
  if (!kernels::isa_available(spec.isa))
    reject(std::string("isa: this machine or this build has no ") + kernels::isa_name(spec.isa));
}

std::string position(int section, size_t instruction, const std::string& kernel) {
  return "section \"" + std::string(kSectionNames[section]) + "\", instruction " +
         std::to_string(instruction) + " (" + kernel + "): ";
}

}  // namespace

std::string space_name(int space) {
  if (space >= kExternal) return "external " + std::to_string(space - kExternal);
  return space < 0 ? "space " + std::to_string(space) : std::string(kSpaceNames[space]);
}

Program::Program(ProgramSpec spec)
    : dtype_(spec.dtype),
      isa_(spec.isa),
      sizes_(spec.sizes),
      n_external_(spec.n_external),
      lanes_(spec.lanes),
      constant_bytes_(static_cast<int64_t>(spec.constants.size())) {
  check_sizes(spec);
  externals_.resize(n_external_);
  size_t n_ints = 0, n_floats = 0;
  const auto count = [&](const InstructionSpec& instruction) {
    n_ints += instruction.ints.size();
    n_floats += instruction.floats.size();
  };
  for (const auto& section : spec.sections)
    for (const auto& instruction : section) {
      count(instruction);
      std::ranges::for_each(instruction.members, count);
    }
  ints_.reserve(n_ints);  // instructions point into these two: they never move
  floats_.reserve(n_floats);
  std::byte* constants = constants_.reserve(std::max<int64_t>(constant_bytes_, 1));
  std::memcpy(constants, spec.constants.data(), spec.constants.size());
  for (int s = 0; s < kSections; ++s) add_section(s, spec.sections[s]);
  find_setup();
  find_kept();
}

// What makes state slot 0 of externals and constants alone. Slot 0 stays as it is through a task: later steps write to
// later slots, unless two serve for all; what else writes to the current slot would spoil it.
void Program::find_setup() {
  std::vector<std::pair<Instruction*, int>> found;  // and how many operands it has
  bool spoiled = rolls_state();
  for (int s = 0; s < kSections; ++s)
    for (size_t n = 0; n < sections_[s].instructions.size(); ++n) {
      Instruction& instruction = sections_[s].instructions[n];
      bool writes = false, alone = s == kPrologue;
      for (int k = 0; k < sections_[s].info[n].n_operands; ++k) {
        const int slot = instruction.first_operand + k, space = operands_[slot].space;
        writes |= writes_[slot] && space == kStateCur;
        alone &= writes_[slot]
                     ? space == kStateCur
                     : space == kConstant || (space >= kExternal && !externals_[space - kExternal].written);
      }
      if (writes && alone) found.push_back({&instruction, sections_[s].info[n].n_operands});
      spoiled |= writes && !alone;
    }
  if (spoiled) return;
  for (const auto& [instruction, operands] : found) {
    instruction->sets_up = true;
    for (int k = 0; k < operands; ++k)
      if (const int space = operands_[instruction->first_operand + k].space; space >= kExternal)
        setup_externals_.push_back(space - kExternal);
  }
}

void Program::find_kept() {
  for (SectionCode& code : sections_)
    for (size_t n = 0; n < code.instructions.size(); ++n) {
      Instruction& instruction = code.instructions[n];
      const kernels::Kernel& kernel = *code.info[n].kernel;
      if (kernel.keeps == nullptr) continue;
      const kernels::Keeping what = kernel.keeps(instruction.ints);
      const Operand& operand = operands_[instruction.first_operand + what.operand];
      if (what.bytes == 0 || operand.space < kExternal || externals_[operand.space - kExternal].written)
        continue;
      instruction.kept = keep({kernel.keep, what, {operand.space, operand.offset}, kept_bytes_});
    }
}

// Its place among what is kept, where the same may be already; -1 where there is no room.
int Program::keep(const Kept& wanted) {
  const auto same = [&](const Kept& kept) {
    return kept.make == wanted.make && kept.source.space == wanted.source.space &&
           kept.source.offset == wanted.source.offset && kept.what.bytes == wanted.what.bytes &&
           std::ranges::equal(kept.what.form, wanted.what.form);
  };
  const auto found = std::ranges::find_if(kept_, same);
  if (found == kept_.end()) {
    if (wanted.what.bytes > kMostKept - kept_bytes_) return -1;
    kept_bytes_ += aligned(wanted.what.bytes);
    kept_.push_back(wanted);
    return static_cast<int>(kept_.size()) - 1;
  }
  return static_cast<int>(found - kept_.begin());
}

void Program::add_section(int s, const std::vector<InstructionSpec>& specs) {
  SectionCode& code = sections_[s];
  for (const InstructionSpec& spec : specs) {
    try {
      add_instruction(s, spec);
    } catch (const std::invalid_argument& error) {
      reject(position(s, code.instructions.size(), spec.kernel) + error.what());
    }
  }
  std::ranges::sort(code.externals);
  code.externals.erase(std::unique(code.externals.begin(), code.externals.end()), code.externals.end());
}

void Program::add_instruction(int s, const InstructionSpec& spec) {
  if (spec.kernel == kChunksKernel.name) return add_chunks(s, spec);
  if (!spec.members.empty()) throw std::invalid_argument("only `chunks` has members");
  const auto [call, sig, first_operand, scratch] = add_call(s, spec, 1, -1);
  scratch_bytes_ = std::max(scratch_bytes_, scratch);
  SectionCode& code = sections_[s];
  const double parts = std::clamp(sig.nanoseconds / kShortestPart, 1.0, 1024.0);
  const int most_parts = call.kernel->splittable && sig.divisible ? static_cast<int>(parts) : 1;
  code.instructions.push_back(
      {call.kernel->run, call.ints, call.floats, call.prepared, first_operand, most_parts});
  code.info.push_back({call.kernel, call.n_operands, call.n_ints, call.n_floats, sig.nanoseconds});
  code.nanoseconds += sig.nanoseconds;
  if (most_parts > 1) code.split += sig.nanoseconds;
}

void Program::add_chunks(int s, const InstructionSpec& spec) {
  if (spec.ints.size() != 2 || !spec.operands.empty() || !spec.floats.empty() || spec.members.empty())
    throw std::invalid_argument("two ints, members, and nothing else expected");
  if (spec.ints[0] < 1 || spec.ints[0] > INT32_MAX || spec.ints[1] < 0 || spec.ints[1] > kMostBytes)
    throw std::invalid_argument("1 to 2^31 - 1 chunks of 0 to 2^47 bytes expected, got " +
                                std::to_string(spec.ints[0]) + " of " + std::to_string(spec.ints[1]));
  const int first_operand = static_cast<int>(operands_.size());
  const int64_t* ints = ints_.data() + ints_.size();
  ints_.insert(ints_.end(), spec.ints.begin(), spec.ints.end());
  Chunks& chunks = chunks_.emplace_back(Chunks{spec.ints[0], {}, {}});
  double nanoseconds = 0;
  for (const InstructionSpec& member : spec.members) {
    try {
      if (!member.members.empty()) throw std::invalid_argument("a member has no members of its own");
      const auto [call, sig, first, scratch] = add_call(s, member, spec.ints[0], spec.ints[1]);
      chunks.members.push_back(call);
      chunks.memory = std::max(chunks.memory, aligned(scratch));
      nanoseconds += sig.nanoseconds * static_cast<double>(chunks.count);
      for (const OperandSpec& o : member.operands)
        chunks.operands.push_back({o.stride, o.space == kChunk ? o.offset : -1});
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("member " + std::to_string(chunks.members.size()) + " (" + member.kernel +
                                  "): " + error.what());
    }
  }
  scratch_bytes_ = std::max(scratch_bytes_, chunks.memory + spec.ints[1]);
  SectionCode& code = sections_[s];
  const double parts = std::clamp(nanoseconds / kShortestPart, 1.0, 1024.0);
  const int most_parts = static_cast<int>(std::clamp<int64_t>(chunks.count, 1, static_cast<int64_t>(parts)));
  code.instructions.push_back({kChunksKernel.run, ints, nullptr, reinterpret_cast<const std::byte*>(&chunks),
                               first_operand, most_parts});
  code.info.push_back({&kChunksKernel, static_cast<int>(chunks.operands.size()), 2, 0, nanoseconds});
  code.nanoseconds += nanoseconds;
  if (most_parts > 1) code.split += nanoseconds;
}

Program::Call Program::add_call(int s, const InstructionSpec& spec, int64_t chunks, int64_t memory) {
  Signature sig = signature(spec.kernel, spec.ints, spec.floats, dtype_);
  const kernels::Kernel* kernel = kernels::find_kernel(spec.kernel, dtype_, isa_);
  if (kernel == nullptr)
    throw std::invalid_argument("this build has no such kernel for the dtype and instruction set");
  if (sig.operands.size() != spec.operands.size())
    throw std::invalid_argument(std::to_string(sig.operands.size()) + " operands expected, got " +
                                std::to_string(spec.operands.size()));
  const int first_operand = static_cast<int>(operands_.size());
  for (size_t n = 0; n < spec.operands.size(); ++n)
    add_operand(s, spec.operands[n], sig.operands[n], n, chunks, memory);
  const int64_t* ints = ints_.data() + ints_.size();
  const double* floats = floats_.data() + floats_.size();
  ints_.insert(ints_.end(), spec.ints.begin(), spec.ints.end());
  floats_.insert(floats_.end(), spec.floats.begin(), spec.floats.end());
  const std::byte* prepared = nullptr;
  if (kernel->prepare) {
    std::byte* const place = prepared_.emplace_back().reserve(kernel->prepared_bytes(ints));
    kernel->prepare(ints, floats, place);
    prepared = place;
  }
  const Chunks::Member call{kernel,
                            ints,
                            floats,
                            prepared,
                            static_cast<int>(spec.operands.size()),
                            static_cast<int>(spec.ints.size()),
                            static_cast<int>(spec.floats.size())};
  return {call, std::move(sig), first_operand, kernel->scratch ? kernel->scratch(ints) : 0};
}

void Program::add_operand(int s, const OperandSpec& spec, const Access& access, size_t index, int64_t chunks,
                          int64_t memory) {
  const auto fail = [&](const std::string& what) {
    throw std::invalid_argument("operand " + std::to_string(index) + " (" + space_name(spec.space) +
                                " at byte " + std::to_string(spec.offset) + "): " + what);
  };
  if (spec.space < 0 || spec.space >= kExternal + n_external_)
    fail("no such space; 0 to " + std::to_string(kExternal + n_external_ - 1) + " expected");
  if (!allowed(s, spec.space) || (spec.space == kChunk && memory < 0))
    fail("this space may not be used in this section");
  if (access.writes && (spec.space == kConstant || spec.space == kCall))
    fail("written to, but the space is read only");
  if (spec.offset > kMostBytes || spec.offset < -kMostBytes) fail("an offset within 2^47 bytes expected");
  if (spec.offset % access.element != 0)
    fail("a multiple of the element's " + std::to_string(access.element) + " bytes expected");
  if (memory < 0 && spec.stride != 0) fail("no stride expected: only members of `chunks` have one");
  const int64_t extent = std::max<int64_t>(access.end - access.first, 0) * access.element;
  if (spec.stride % access.element != 0 || spec.stride < 0 ||
      spec.stride > kMostBytes / std::max<int64_t>(chunks, 1))
    fail("a stride of at least 0, a multiple of the element's bytes, and within 2^47 bytes in all expected");
  if (chunks > 1 && access.writes && spec.space != kChunk && spec.stride < extent)
    fail("chunks of " + std::to_string(extent) + " bytes are written " + std::to_string(spec.stride) +
         " apart");
  const int64_t first = spec.offset + access.first * access.element,
                end = spec.offset + access.end * access.element +
                      std::max<int64_t>(chunks - 1, 0) * spec.stride;
  const int64_t bytes = bytes_of(spec.space, memory);
  if (access.end > access.first && bytes >= 0 && (first < 0 || end > bytes))
    fail("bytes " + std::to_string(first) + " to " + std::to_string(end) + " are " +
         (access.writes ? "written" : "read") + ", but the space has " + std::to_string(bytes));

  const Operand operand{spec.space, static_cast<int>(operands_.size()), spec.offset};
  operands_.push_back(operand);
  writes_.push_back(access.writes);
  if (moves(spec.space)) sections_[s].moving.push_back(operand);
  if (spec.space < kExternal) {
    used_[spec.space] = true;
    return;
  }
  sections_[s].externals.push_back(spec.space - kExternal);
  ExternalUse& use = externals_[spec.space - kExternal];
  use.element = std::max(use.element, access.element);
  use.touched |= access.end > access.first;
  use.written |= access.writes;
}

int64_t Program::bytes_of(int space, int64_t memory) const {
  switch (space) {
    case kArena:
      return sizes_.arena;
    case kStateCur:
    case kStateNext:
      return sizes_.state;
    case kAdjointCur:
    case kAdjointNext:
      return sizes_.adjoint;
    case kAccumulator:
      return sizes_.accumulator;
    case kConstant:
      return constant_bytes_;
    case kCall:
      return record_bytes();
    case kChunk:
      return memory;
    default:
      return -1;
  }
}

bool Program::splits() const {
  return std::ranges::any_of(sections_, [](const SectionCode& code) { return code.split > 0; });
}

bool Program::rolls_state() const {
  return sections_[kMeta].instructions.empty() && sections_[kEpilogue].instructions.empty();
}

double Program::nanoseconds(int64_t tasks, int64_t steps) const {
  return guess(&SectionCode::nanoseconds, tasks, steps);
}

double Program::split_nanoseconds(int64_t tasks, int64_t steps) const {
  return guess(&SectionCode::split, tasks, steps);
}

double Program::guess(double SectionCode::* part, int64_t tasks, int64_t steps) const {
  const double once = sections_[kPrologue].*part + sections_[kQuery].*part + sections_[kEpilogue].*part;
  const double each = sections_[kInner].*part + sections_[kMeta].*part;
  return static_cast<double>(tasks) * (once + static_cast<double>(steps) * each);
}

}  // namespace metafast
