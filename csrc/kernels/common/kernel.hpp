// One kernel: the record every backend fills in and the replay calls. Plain C++; included by files compiled
// for any instruction set, so it defines no function and holds no template of the standard library.
#pragma once
#include <cstddef>
#include <cstdint>

namespace metafast::kernels {

enum class DType : int { f32, f64 };
enum class Isa : int { baseline, avx2, avx512 };  // baseline: x86-64-v1, or NEON on aarch64

// What one call gets. Strides and sizes in `i` count elements; every pointer is aligned to its element alone.
struct Args {
  void* const* ptr;    // operands, in the order of the kernel's row (see kernels.hpp)
  const int64_t* i;    // shape, strides, flags
  const double* f;     // immediates
  std::byte* scratch;  // at least Kernel::scratch(i) bytes, aligned to 64, this call's alone
  int part, parts;     // this call computes share `part` of `parts` of the output (1 unless splittable)
  const std::byte* prepared;  // what Kernel::prepare wrote, where the kernel has one; else null
  std::byte* kept = nullptr;  // what Kernel::keep made of an operand, or null
};

// Of which operand a call makes something that serves every call with the same numbers there, and how many bytes that
// takes: 0 where there is no such operand. Calls of one `form` make the same of the same operand.
struct Keeping {
  int operand;
  int64_t bytes;
  int64_t form[4];
};

// The largest program of one `pointwise` call; kernel_arity refuses larger ones.
inline constexpr int kPointwiseOperands = 32;             // inputs and outputs together
inline constexpr int kMostOperands = kPointwiseOperands;  // of any kernel
inline constexpr int kPointwiseRegisters = 96;            // and immediates
inline constexpr int kPointwiseOps = 96;
inline constexpr int kPointwiseRank = 8;
inline constexpr int kReduceRank = 8;  // of `reduce`: dimensions kept, and dimensions reduced

// How far before their use streams of large arrays are fetched: a page, where the processor's own prefetch ends.
inline constexpr int kAheadBytes = 4096;
inline constexpr int64_t kLargeBytes = 1 << 18;  // arrays from here on may lie beyond the second-level cache

enum Status : int { kOk = 0, kLabelOutOfRange = 1 };

using Run = int (*)(const Args&) noexcept;               // a Status
using Scratch = int64_t (*)(const int64_t* i) noexcept;  // bytes of scratch one call needs
// Decodes ints and immediates once for any number of calls into `place`, which is aligned to 64, stays where
// it is and is only read from then on.
using Prepare = void (*)(const int64_t* i, const double* f, std::byte* place) noexcept;
using Keeps = Keeping (*)(const int64_t* i) noexcept;
using Keep = void (*)(const Args&) noexcept;  // writes it to Args::kept

// A splittable kernel may be called once for each part 0..parts-1, in any order and at the same time;
// together the parts write what one whole call writes, bit for bit.
struct Kernel {
  const char* name;
  Run run;
  Scratch scratch;
  bool splittable;
  Scratch prepared_bytes = nullptr;  // bytes prepare writes
  Prepare prepare = nullptr;         // null: calls read the ints themselves
  Keeps keeps = nullptr;             // null: nothing can be kept
  Keep keep = nullptr;
};

// Whether a correlation with 3×3 taps takes less time by Winograd's form: multiply-adds of the direct form against those
// of the points' products, with the transforms of tiles and of filters in multiply-adds that take as long.
bool winograd_pays(int64_t height, int64_t width, int64_t images, int64_t channels, int64_t columns) noexcept;
// The same of the form that goes down the columns alone, against the direct one.
bool winograd_down_pays(int64_t height, int64_t width, int64_t images, int64_t channels,
                        int64_t columns) noexcept;
// Elements that have room for the transformed filters of so many channels and columns, in any instruction set.
int64_t winograd_filter_elements(int64_t channels, int64_t columns) noexcept;

}  // namespace metafast::kernels
