// Program as text.
#include <iomanip>
#include <sstream>

#include "program.hpp"

namespace metafast {
namespace {

template <class T>
void write_list(std::ostream& out, const T* values, int count) {
  for (int n = 0; n < count; ++n) out << (n ? " " : "") << values[n];
}

void write_line(std::ostream& out, const Program& program, const SectionCode& code, size_t n) {
  const Instruction& instruction = code.instructions[n];
  const InstructionInfo& info = code.info[n];
  out << std::setw(5) << n << (instruction.most_parts > 1 ? " * " : "   ") << std::left << std::setw(16)
      << info.kernel->name << std::right;
  for (int o = 0; o < info.n_operands; ++o) {
    const Operand& operand = program.operands()[instruction.first_operand + o];
    out << (o ? ", " : "") << space_name(operand.space) << "+" << operand.offset;
  }
  out << " [";
  write_list(out, instruction.ints, info.n_ints);
  out << "]";
  if (info.n_floats) {
    out << " {";
    write_list(out, instruction.floats, info.n_floats);
    out << "}";
  }
  out << "\n";
}

void write_members(std::ostream& out, const Chunks& chunks) {
  for (const Chunks::Member& member : chunks.members) {
    out << "          " << member.kernel->name << " [";
    write_list(out, member.ints, member.n_ints);
    out << "]\n";
  }
}

}  // namespace

std::string Program::summary() const {
  std::ostringstream out;
  out << "Program " << (dtype_ == kernels::DType::f32 ? "f32 " : "f64 ") << kernels::isa_name(isa_) << ":";
  for (int s = 0; s < kSections; ++s)
    out << " " << kSectionNames[s] << " " << sections_[s].instructions.size();
  out << "; bytes: arena " << sizes_.arena << ", state " << sizes_.state << ", adjoint " << sizes_.adjoint
      << ", accumulator " << sizes_.accumulator << ", constant " << constant_bytes_ << ", scratch "
      << scratch_bytes_ << "; " << n_external_ << " external";
  return out.str();
}

std::string Program::dump() const {
  std::ostringstream out;
  out << std::setprecision(9) << summary() << "\n";
  for (int s = 0; s < kSections; ++s) {
    if (sections_[s].instructions.empty()) continue;
    out << kSectionNames[s] << ":\n";
    for (size_t n = 0; n < sections_[s].instructions.size(); ++n) {
      const Instruction& instruction = sections_[s].instructions[n];
      write_line(out, *this, sections_[s], n);
      if (instruction.run == kChunksKernel.run)
        write_members(out, *reinterpret_cast<const Chunks*>(instruction.prepared));
    }
  }
  out << "(* split over workers where tasks are fewer than they; [ints] {floats}; offsets in bytes)\n";
  return out.str();
}

}  // namespace metafast
