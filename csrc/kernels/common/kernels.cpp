#include "kernels.hpp"

#include <cstdlib>

#include "../cpu/table.hpp"
#include "opcodes.hpp"

namespace metafast::kernels {
namespace {

constexpr const char* kIsaNames[kIsaCount] = {"baseline", "avx2", "avx512"};
constexpr int kVectorBytes[kIsaCount] = {16, 32, 64};

struct OpcodeRow {
  const char* name;
  int arity;
};
constexpr OpcodeRow kOpcodes[] = {
#define X(name, operands) {#name, operands},
    METAFAST_POINTWISE_OPCODES(X)
#undef X
};

bool processor_runs(Isa isa) noexcept {
#if defined(METAFAST_X86_SETS)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma");
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

Isa detect_isa() noexcept {
  int widest = 0;
  for (int k = 1; k < kIsaCount; ++k)
    if (isa_available(static_cast<Isa>(k))) widest = k;
  Isa asked;
  if (const char* name = std::getenv("METAFAST_ISA"); name && isa_from_name(name, &asked))
    if (static_cast<int>(asked) < widest) widest = static_cast<int>(asked);
  return static_cast<Isa>(widest);
}

// The counts of a row that has no lists.
struct Shape {
  const char* name;
  int64_t ptrs, ints, floats;
  int extra_flag;  // position of the flag that adds one operand, or -1
};
constexpr Shape kShapes[] = {
    {"gemm", 3, 16, 0, 14},           {"conv_fwd", 3, 22, 0, 21},         {"conv_dx", 3, 22, 0, -1},
    {"conv_dw", 3, 22, 0, -1},        {"winograd_filters", 2, 23, 0, -1}, {"standardize", 5, 3, 1, -1},
    {"moments", 3, 3, 0, -1},         {"join_moments", 5, 3, 1, -1},      {"project", 5, 4, 0, -1},
    {"project_tangent", 6, 4, 0, -1}, {"log_softmax", 2, 3, 0, -1},       {"max_pool", 3, 15, 0, 14},
    {"pool_gather", 3, 6, 0, -1},     {"pool_scatter", 3, 7, 0, -1},      {"avg_pool", 2, 15, 0, -1},
    {"avg_pool_adj", 2, 15, 0, -1},   {"one_hot", 2, 6, 0, -1},           {"fill", 1, 1, 1, -1},
    {"cumsum", 2, 4, 0, -1},
};

constexpr int kGemmPair = 15;  // whether two more operands follow, a second product
constexpr int kGemmMode = 13;  // from 2 on a product is taken up by another matrix, times a number

bool pointwise_arity(const int64_t* ints, int64_t n, Arity* arity) noexcept {
  if (n < 5) return false;
  const int64_t rank = ints[0], n_in = ints[1], n_out = ints[2], n_ops = ints[3], n_regs = ints[4];
  if (rank < 0 || n_in < 0 || n_out < 1 || n_ops < 0 || n_regs < n_in) return false;
  if (rank > kPointwiseRank || n_in + n_out > kPointwiseOperands || n_ops > kPointwiseOps ||
      n_regs > kPointwiseRegisters)
    return false;
  const int64_t before_ops = 5 + rank + (n_in + n_out) * rank + 2 * n_out;
  *arity = {n_in + n_out, before_ops + 5 * n_ops + 1, 0};
  if (n < arity->ints) return true;  // too few: the caller compares
  for (int64_t k = 0; k < n_out; ++k) {
    const int64_t reg = ints[before_ops - 2 * n_out + k];
    if (reg < 0 || reg >= n_regs) return false;
  }
  for (int64_t k = 0; k < n_ops; ++k) {
    const int64_t* op = ints + before_ops + 5 * k;
    if (op[0] < 0 || op[0] >= pointwise_opcode_count() || op[1] < n_in || op[1] >= n_regs) return false;
    for (int j = 0; j < kOpcodes[op[0]].arity; ++j) {
      if (op[2 + j] >= n_regs || op[2 + j] < -kPointwiseRegisters) return false;
      if (op[2 + j] < 0 && -op[2 + j] > arity->floats) arity->floats = -op[2 + j];
    }
  }
  return true;
}

}  // namespace

bool winograd_pays(int64_t height, int64_t width, int64_t images, int64_t channels,
                   int64_t columns) noexcept {
  if (channels < 16 || columns < 16) return false;
  const auto tiles = [](int64_t outputs) { return (outputs + 3) / 4; };
  const auto points = [&](int64_t outputs) {  // tiles of 4 have 6, those of 3 have 5
    const int64_t missing = 4 * tiles(outputs) - outputs;
    return 6 * tiles(outputs) - (missing < tiles(outputs) ? missing : tiles(outputs));
  };
  const int64_t products = images * points(height) * points(width) * channels * columns;
  const int64_t transforms =
      200 * (images * tiles(height) * tiles(width) * (channels + columns) + channels * columns);
  return products + transforms < 9 * images * height * width * channels * columns;
}

bool winograd_down_pays(int64_t height, int64_t width, int64_t images, int64_t channels,
                        int64_t columns) noexcept {
  const int64_t tiles = images * ((height + 3) / 4) * width, products = channels * columns;
  const int64_t transforms = tiles * (12 * columns + 80 * channels) + 60 * products;
  return 18 * tiles * products + transforms < 9 * images * height * width * products;
}

int64_t winograd_filter_elements(int64_t channels, int64_t columns) noexcept {
  return 36 * (channels + 16) * ((columns + 31) / 32 * 32);
}

KernelTable kernels(DType dtype, Isa isa) noexcept {
  const bool f32 = dtype == DType::f32;
  switch (isa) {
    case Isa::baseline:
      return f32 ? baseline::table_f32() : baseline::table_f64();
#if defined(METAFAST_X86_SETS)
    case Isa::avx2:
      return f32 ? avx2::table_f32() : avx2::table_f64();
    case Isa::avx512:
      return f32 ? avx512::table_f32() : avx512::table_f64();
#else
    default:
      break;
#endif
  }
  return {nullptr, 0};
}

const Kernel* find_kernel(std::string_view name, DType dtype, Isa isa) noexcept {
  for (const Kernel& k : kernels(dtype, isa))
    if (name == k.name) return &k;
  return nullptr;
}

bool isa_available(Isa isa) noexcept { return kernels(DType::f32, isa).count > 0 && processor_runs(isa); }

Isa best_isa() noexcept {
  static const Isa isa = detect_isa();
  return isa;
}

int vector_bytes(Isa isa) noexcept { return kVectorBytes[static_cast<int>(isa)]; }

const char* isa_name(Isa isa) noexcept { return kIsaNames[static_cast<int>(isa)]; }

bool isa_from_name(std::string_view name, Isa* isa) noexcept {
  for (int k = 0; k < kIsaCount; ++k)
    if (name == kIsaNames[k]) return *isa = static_cast<Isa>(k), true;
  return false;
}

int pointwise_opcode_count() noexcept { return sizeof kOpcodes / sizeof kOpcodes[0]; }
const char* pointwise_opcode_name(int opcode) noexcept { return kOpcodes[opcode].name; }
int pointwise_opcode_arity(int opcode) noexcept { return kOpcodes[opcode].arity; }

bool kernel_arity(std::string_view name, const int64_t* ints, int64_t n, Arity* arity) noexcept {
  if (name == "pointwise") return pointwise_arity(ints, n, arity);
  if (name == "reduce") {
    if (n < 2 || ints[0] < 0 || ints[0] > n || ints[1] < 0 || ints[1] > n) return false;
    *arity = {2, 2 + 3 * ints[0] + 2 * ints[1] + 2, 1};
    return true;
  }
  for (const Shape& s : kShapes) {
    if (name != s.name) continue;
    *arity = {s.ptrs, s.ints, s.floats};
    if (s.extra_flag >= 0 && n > s.extra_flag && ints[s.extra_flag]) arity->ptrs += 1;
    if (name == "gemm" && n > kGemmMode && (ints[kGemmMode] == 2 || ints[kGemmMode] == 3)) arity->ptrs += 2;
    if (name == "gemm" && n > kGemmPair && ints[kGemmPair]) arity->ptrs += 2;
    return true;
  }
  return false;
}

}  // namespace metafast::kernels
