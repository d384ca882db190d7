// Machine code that lives as long as the process: equal code is there once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace metafast::kernels::code {

// A page each, never given back, of the mappings that the system allows a process (65530 on Linux): code for ever new
// shapes stops there, and the interpreter goes on.
inline constexpr size_t kMostPieces = 4096;

// Where the code can be called; null where the system lets no page be executed, or there are so many pieces already.
const void* install(const std::vector<uint8_t>& code);

int64_t pieces_installed();

}  // namespace metafast::kernels::code
