// Kernels driven through stdin and stdout, for processors this machine can only emulate: no Python runs there.
// tests/machines.py is the other end.
//
//   request: 7 counts: dtype, parts, characters of the name, storages, operands, ints, floats; then the name, the bytes
//            of each storage, (storage, byte offset) of each operand, ints, floats, and the storages
//   answer:  the kernel's status and the storages as it left them; or -1 where it refused, and nothing else
//
// Numbers are int64 and double in the order of this processor.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "run_kernel.hpp"

using namespace metafast;

namespace {

template <class T>
void read(T* into, size_t count) {
  if (count && std::fread(into, sizeof(T), count, stdin) != count) std::exit(1);
}

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  read(values.data(), values.size());
  return values;
}

template <class T>
void write(const T* from, size_t count) {
  if (count && std::fwrite(from, sizeof(T), count, stdout) != count) std::exit(1);
}

struct Operand {
  int64_t storage, offset;
};

void serve(const std::vector<int64_t>& counts) {
  const auto dtype = static_cast<kernels::DType>(counts[0]);
  const auto letters = read<char>(counts[2]);
  const std::string name(letters.begin(), letters.end());
  const auto bytes = read<int64_t>(counts[3]);
  const auto places = read<Operand>(counts[4]);
  const auto ints = read<int64_t>(counts[5]);
  const auto floats = read<double>(counts[6]);
  std::vector<std::vector<std::byte>> storages;
  for (const int64_t size : bytes) storages.push_back(read<std::byte>(size));

  std::vector<void*> operands;
  for (const Operand& place : places) operands.push_back(storages[place.storage].data() + place.offset);
  const int64_t status =
      run_kernel(name, dtype, kernels::best_isa(), operands, ints, floats, static_cast<int>(counts[1]));
  write(&status, 1);
  for (const auto& storage : storages) write(storage.data(), storage.size());
}

}  // namespace

int main() {
  for (int first; (first = std::getchar()) != EOF; std::fflush(stdout)) {
    std::ungetc(first, stdin);
    try {
      serve(read<int64_t>(7));
    } catch (const std::invalid_argument& error) {
      std::fprintf(stderr, "%s\n", error.what());
      const int64_t refused = -1;
      write(&refused, 1);
    }
  }
}
