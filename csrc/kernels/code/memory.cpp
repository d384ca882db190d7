#include "memory.hpp"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>

namespace metafast::kernels::code {
namespace {

// Never destroyed: threads may be in the code when the process ends.
struct Store {
  std::mutex mutex;
  std::map<std::vector<uint8_t>, const void*> pieces;
};

Store& store() {
  static Store& only = *new Store;
  return only;
}

// Pages are never writable and executable at once, so that every piece has its own.
const void* map(const std::vector<uint8_t>& code) {
  void* const pages = mmap(nullptr, code.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  std::memcpy(pages, code.data(), code.size());
  if (mprotect(pages, code.size(), PROT_READ | PROT_EXEC) == 0) return pages;
  munmap(pages, code.size());
  return nullptr;
}

}  // namespace

const void* install(const std::vector<uint8_t>& code) {
  const std::lock_guard lock(store().mutex);
  auto& pieces = store().pieces;
  if (const auto found = pieces.find(code); found != pieces.end()) return found->second;
  if (pieces.size() >= kMostPieces) return nullptr;
  return pieces[code] = map(code);
}

int64_t pieces_installed() {
  const std::lock_guard lock(store().mutex);
  int64_t count = 0;
  for (const auto& [code, place] : store().pieces) count += place != nullptr;
  return count;
}

}  // namespace metafast::kernels::code
