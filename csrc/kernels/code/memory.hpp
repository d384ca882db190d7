// Machine code that lives as long as the process: equal code is there once.
#pragma once
#include <cstdint>
#include <vector>

namespace metafast::kernels::code {

// Where the code can be called; null where the system lets no page be executed.
const void* install(const std::vector<uint8_t>& code);

int64_t pieces_installed();

}  // namespace metafast::kernels::code
