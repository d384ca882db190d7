#include "signature.hpp"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernels/common/kernels.hpp"

namespace metafast {
namespace {

using Ints = std::span<const int64_t>;

[[noreturn]] void reject(const std::string& message) { throw std::invalid_argument(message); }

// Sizes, strides and their products stay below this many elements, which no memory holds: so nothing made of a few
// of them overflows, neither here nor in a kernel.
constexpr int64_t kMost = int64_t{1} << 44;

int64_t bounded(int64_t n) {
  if (n > kMost || n < -kMost) reject("sizes or strides reach beyond 2^44 elements");
  return n;
}

int64_t times(int64_t a, int64_t b) {
  int64_t n;
  return bounded(__builtin_mul_overflow(a, b, &n) ? INT64_MAX : n);
}

// Of all dimensions; empty ones must not hide that the others overflow.
int64_t product(Ints dims) {
  int64_t n = 1;
  for (const int64_t d : dims) n = times(n, std::max<int64_t>(d, 1));
  return std::ranges::find(dims, 0) == dims.end() ? n : 0;
}
int64_t product(std::initializer_list<int64_t> dims) { return product(Ints(dims.begin(), dims.size())); }

double volume(Ints dims) {
  double n = 1;
  for (const int64_t d : dims) n *= static_cast<double>(d);
  return n;
}

enum Role { in, out };

// Collects the accesses of one call in operand order.
class Call {
 public:
  Call(Ints ints, int element) : i(ints), element_(element) {}

  void dense(Role role, int64_t count) { add(role, 0, count, element_); }
  void index(Role role, int64_t count) { add(role, 0, count, 4); }

  void strided(Role role, std::initializer_list<int64_t> dims, std::initializer_list<int64_t> strides,
               int element = 0) {
    strided(role, Ints(dims.begin(), dims.size()), Ints(strides.begin(), strides.size()), element);
  }

  void strided(Role role, Ints dims, Ints strides, int element = 0) {
    int64_t first = 0, last = 0;
    bool empty = false;
    for (size_t d = 0; d < dims.size(); ++d) {
      empty |= dims[d] == 0;
      int64_t& end = bounded(strides[d]) < 0 ? first : last;
      end = bounded(end + times(dims[d] - 1, strides[d]));
    }
    add(role, first, empty ? first : last + 1, element ? element : element_);
  }

  void sizes(size_t from, size_t end) const {
    for (size_t n = from; n < end; ++n)
      if (bounded(i[n]) < 0)
        reject("ints[" + std::to_string(n) + "] is a size: at least 0 expected, got " + std::to_string(i[n]));
  }

  void within(size_t n, int64_t low, int64_t high, const char* what) const {
    if (i[n] >= low && i[n] <= high) return;
    reject("ints[" + std::to_string(n) + "] is the " + what + ": " + std::to_string(low) + " to " +
           std::to_string(high) + " expected, got " + std::to_string(i[n]));
  }

  void flag(size_t n, const char* what) const { within(n, 0, 1, what); }

  int element() const { return element_; }

  Ints i;
  Signature result{};

 private:
  void add(Role role, int64_t first, int64_t end, int element) {
    result.operands.push_back({first, end, element, role == out});
  }

  int element_;
};

// Rates of one thread, from runs on Zen 5 with AVX-512; a factor of a few either way does no harm.
constexpr double kFlopsPerNanosecond = 60;
constexpr double kElementsPerNanosecond = 4;

// What a sum is written over: one element for all that it adds up, were it nothing.
std::vector<int64_t> kept(Ints dims, Ints strides) {
  std::vector<int64_t> sizes(dims.begin(), dims.end());
  for (size_t d = 0; d < sizes.size(); ++d)
    if (strides[d] == 0) sizes[d] = 1;
  return sizes;
}

// Registers and opcodes have been checked with the counts.
void pointwise(Call& c) {
  const size_t rank = c.i[0], n_in = c.i[1], n_out = c.i[2], n_ops = c.i[3];
  size_t at = 5;
  const auto take = [&](size_t count) { return at += count, c.i.subspan(at - count, count); };
  c.sizes(0, 5 + rank);
  const Ints dims = take(rank);
  for (size_t n = 0; n < n_in; ++n) c.strided(in, dims, take(rank));
  const size_t outs = at;
  const Ints modes = c.i.subspan(outs + n_out * (rank + 1), n_out);
  for (size_t n = 0; n < n_out; ++n) {
    const Ints strides = take(rank);
    c.strided(out, modes[n] < 2 ? std::vector<int64_t>(dims.begin(), dims.end()) : kept(dims, strides),
              strides);
  }
  at += n_out;
  for (size_t n = 0; n < n_out; ++n, ++at) {
    c.within(at, 0, 3, "mode of an output (0 assigns, 1 adds; 2 and 3: of a sum)");
    c.result.divisible &=
        c.i[at] < 2 || (rank > 1 && c.i[outs + n * rank] != 0);  // a sum for each of dims[0]
  }
  c.flag(at + 5 * n_ops, "compiled (whether it may become machine code)");
  c.result.nanoseconds = static_cast<double>(product(dims)) * static_cast<double>(n_in + n_out + 2 * n_ops) /
                         (2 * kElementsPerNanosecond);
}

void reduce(Call& c) {
  const size_t nk = c.i[0], nr = c.i[1];
  c.within(0, 0, kernels::kReduceRank, "number of dimensions kept");
  c.within(1, 0, kernels::kReduceRank, "number of dimensions reduced");
  c.sizes(0, 2 + nk + nr);
  const Ints kept = c.i.subspan(2, nk), dims = c.i.subspan(2, nk + nr);
  c.strided(in, dims, c.i.subspan(2 + nk + nr, nk + nr));
  c.strided(out, kept, c.i.subspan(2 + 2 * (nk + nr), nk));
  const size_t mode = 2 + 2 * (nk + nr) + nk;
  c.flag(mode, "mode (0 assigns, 1 adds)");
  c.flag(mode + 1, "kind (0 sum, 1 max)");
  c.result.nanoseconds = static_cast<double>(product(dims)) / kElementsPerNanosecond;
}

void gemm(Call& c) {
  const auto& i = c.i;
  c.sizes(0, 4);
  c.within(13, 0, 3, "mode (0 assigns, 1 adds; 2 and 3: to, from D)");
  c.within(14, 0, i[13] < 2, "flag of a bias");
  c.strided(in, {i[0], i[1], i[3]}, {i[4], i[5], i[6]});
  c.strided(in, {i[0], i[3], i[2]}, {i[7], i[8], i[9]});
  c.strided(out, {i[0], i[1], i[2]}, {i[10], i[11], i[12]});
  if (i[14]) c.dense(in, i[2]);
  if (i[13] >= 2) c.strided(in, {i[0], i[1], i[2]}, {i[10], i[11], i[12]}), c.dense(in, 1);
  c.flag(15, "flag of a pair");
  if (i[15]) {
    c.strided(in, {i[0], i[1], i[3]}, {i[4], i[5], i[6]});
    c.strided(in, {i[0], i[3], i[2]}, {i[7], i[8], i[9]});
  }
  product({i[0], i[1], i[2]}), product({i[0], i[1], i[3]}), product({i[0], i[2], i[3]});
  c.result.nanoseconds = (i[15] ? 4.0 : 2.0) * volume(i.first(4)) / kFlopsPerNanosecond;
}

int64_t filters(int64_t channels, int64_t columns) {
  times(36, times(channels + 16, columns + 31));
  return kernels::winograd_filter_elements(channels, columns);
}

void winograd_form(Call& c) {
  if (c.element() != 4) reject("float32 expected: Winograd's form has too few digits for float64");
  for (size_t n : {5, 6}) c.within(n, 3, 3, "size of a filter of Winograd's form");
  for (size_t n : {7, 8, 11, 12}) c.within(n, 1, 1, "stride or dilation of Winograd's form");
}

void conv(Call& c, Role x, Role w, Role y) {
  const auto& i = c.i;
  c.sizes(0, 7);
  for (size_t n : {7, 8, 11, 12}) c.within(n, 1, int64_t{1} << 30, "stride or dilation");
  c.sizes(9, 11);
  const auto extent = [&](int axis) {
    const int64_t span = i[1 + axis] + 2 * i[9 + axis] - times(i[11 + axis], i[5 + axis] - 1) - 1;
    return span < 0 ? 0 : span / i[7 + axis] + 1;
  };
  for (int axis : {0, 1})
    c.within(13 + axis, extent(axis), extent(axis), axis ? "output width" : "output height");
  c.flag(19, "mode (0 assigns, 1 adds)");
  const bool correlates = w == in;
  c.within(20, 0, correlates ? 2 : 1, "flag of Winograd's form");
  if (i[20] == 2) winograd_form(c);
  c.within(21, 0,
           y == out   ? 1
           : w == out ? std::max<int64_t>(i[0], 1)
                      : 0,
           w == out ? "number of pieces" : "flag of a bias, which only conv_fwd takes");
  product(i.subspan(3, 4));
  const auto image = [&] { c.dense(x, product(i.first(4))); };
  const int64_t pieces = w == out ? std::max<int64_t>(i[21], 1) : 1;
  const auto weight = [&] {
    if (i[20] == 2)
      c.dense(w, y == out ? filters(i[3], i[4]) : filters(i[4], i[3]));
    else
      c.strided(w, {pieces, i[4], i[3], i[5], i[6]}, {product(i.subspan(3, 4)), i[15], i[16], i[17], i[18]});
  };
  const auto result = [&] { c.dense(y, product({i[0], i[13], i[14], i[4]})); };
  if (y == out) image(), weight(), result();
  if (x == out) result(), weight(), image();
  if (w == out) image(), result(), weight();
  if (i[21] && y == out) c.dense(in, i[4]);
  c.result.nanoseconds = 2.0 * volume({{i[0], i[13], i[14]}}) * volume(i.subspan(3, 4)) / kFlopsPerNanosecond;
}

void conv_fwd(Call& c) { conv(c, in, in, out); }
void conv_dx(Call& c) { conv(c, out, in, in); }
void conv_dw(Call& c) { conv(c, in, out, in); }

void winograd_filters(Call& c) {
  const auto& i = c.i;
  c.sizes(0, 7);
  winograd_form(c);
  c.flag(22, "adjoint (for conv_dx)");
  c.strided(in, {i[4], i[3], i[5], i[6]}, {i[15], i[16], i[17], i[18]});
  c.dense(out, i[22] ? filters(i[4], i[3]) : filters(i[3], i[4]));
  c.result.nanoseconds = 80 * volume(i.subspan(3, 2)) / kFlopsPerNanosecond;
}

// The kernels over (outer, reduce, inner): `full` operands of that shape, the others of (outer, inner).
struct Row {
  Role role;
  bool full;
};

void rows(Call& c, std::initializer_list<Row> operands) {
  c.sizes(0, 3);
  for (const Row& r : operands) c.dense(r.role, product({c.i[0], c.i[2], r.full ? c.i[1] : 1}));
  c.result.nanoseconds = 3.0 * static_cast<double>(product(c.i.first(3))) / kElementsPerNanosecond;
}

void standardize(Call& c) { rows(c, {{in, true}, {out, true}, {out, false}, {out, false}, {out, false}}); }
void moments(Call& c) { rows(c, {{in, true}, {out, false}, {out, false}}); }
void join_moments(Call& c) { rows(c, {{in, true}, {in, true}, {out, false}, {out, false}, {out, false}}); }
void project(Call& c) {
  c.flag(3, "mode (0 assigns, 1 adds)");
  rows(c, {{in, true}, {in, true}, {in, false}, {out, true}, {out, false}});
}
void project_tangent(Call& c) {
  c.flag(3, "mode (0 assigns, 1 adds)");
  rows(c, {{in, true}, {in, true}, {in, true}, {in, false}, {in, false}, {out, true}});
}
void log_softmax(Call& c) { rows(c, {{in, true}, {out, true}}); }
void cumsum(Call& c) {
  c.flag(3, "flag of summing from the end");
  rows(c, {{in, true}, {out, true}});
}

int64_t images(const Call& c) { return product(c.i.first(4)); }

// N·OH·OW·C, where OH stands at ints[at].
int64_t pooled(const Call& c, size_t at) { return product({c.i[0], c.i[at], c.i[at + 1], c.i[3]}); }

// The windows of a pool: ints from 4 on are kernel, stride, padding (and dilation) of the two axes; `outputs` is where
// their numbers stand. Every window must begin before the end of the picture and no earlier than its own length.
void windows(const Call& c, size_t outputs, bool dilated) {
  for (size_t axis : {0, 1}) {
    const size_t at = 4 + axis;
    c.within(at, 1, kMost, "size of a window");
    c.within(at + 2, 1, int64_t{1} << 30, "stride");
    if (dilated) c.within(at + 6, 1, int64_t{1} << 30, "dilation");
    const int64_t size = c.i[1 + axis], reach = times(dilated ? c.i[at + 6] : 1, c.i[at] - 1);
    c.within(at + 4, 0, reach, "padding");
    const int64_t starts = size > 0 ? (size + c.i[at + 4] - 1) / c.i[at + 2] + 1 : 0;
    c.within(outputs + axis, 0, starts, axis ? "output width" : "output height");
  }
  product({c.i[4], c.i[5]});
}

// Winners are int32 places in a picture.
void places(const Call& c) {
  if (product({c.i[1], c.i[2]}) > INT32_MAX)
    reject("pictures of at most 2^31 - 1 pixels expected, got " + std::to_string(c.i[1]) + " x " +
           std::to_string(c.i[2]));
}

void max_pool(Call& c) {
  c.sizes(0, 14);
  windows(c, 12, true);
  places(c);
  for (size_t axis : {0, 1})  // else a window may step over the whole picture, and nothing wins
    if (c.i[8 + axis] > 0 && c.i[12 + axis] > 0)
      c.within(10 + axis, 1, c.i[1 + axis], "dilation of a padded picture");
  c.dense(in, images(c));
  c.dense(out, pooled(c, 12));
  c.index(out, pooled(c, 12));
  c.flag(14, "flag of a sign");
  if (c.i[14]) c.dense(in, c.i[3]);
  c.result.nanoseconds =
      static_cast<double>(pooled(c, 12)) * volume({{c.i[4], c.i[5]}}) / kElementsPerNanosecond;
}

void pool_gather(Call& c) {
  c.sizes(0, 6);
  places(c);
  c.dense(in, images(c));
  c.index(in, pooled(c, 4));
  c.dense(out, pooled(c, 4));
  c.result.nanoseconds = static_cast<double>(pooled(c, 4));
}

void pool_scatter(Call& c) {
  c.sizes(0, 6);
  places(c);
  c.flag(6, "mode (0 zeroes first, 1 adds)");
  c.dense(in, pooled(c, 4));
  c.index(in, pooled(c, 4));
  c.dense(out, images(c));
  c.result.nanoseconds =
      static_cast<double>(images(c)) / kElementsPerNanosecond + static_cast<double>(pooled(c, 4));
}

void average(Call& c, bool adjoint) {
  c.sizes(0, 12);
  windows(c, 10, false);
  c.flag(14, "mode (0 assigns, 1 adds)");
  c.dense(in, adjoint ? pooled(c, 10) : images(c));
  c.dense(out, adjoint ? images(c) : pooled(c, 10));
  c.result.nanoseconds =
      static_cast<double>(pooled(c, 10)) * volume({{c.i[4], c.i[5]}}) / kElementsPerNanosecond;
}

void avg_pool(Call& c) { average(c, false); }
void avg_pool_adj(Call& c) { average(c, true); }

void one_hot(Call& c) {
  c.sizes(0, 2);
  c.flag(4, "real (labels of the element type)");
  c.flag(5, "wraps (labels below 0 count from the end)");
  c.strided(in, {c.i[0]}, {c.i[3]}, c.i[4] != 0 ? 0 : 8);
  c.dense(out, product(c.i.first(2)));
  c.result.nanoseconds = volume(c.i.first(2)) / kElementsPerNanosecond;
}

void fill(Call& c) {
  c.sizes(0, 1);
  c.dense(out, c.i[0]);
  c.result.nanoseconds = static_cast<double>(c.i[0]) / kElementsPerNanosecond;
}

struct Describe {
  std::string_view kernel;
  void (*describe)(Call&);
};

constexpr Describe kDescribe[] = {
    {"pointwise", pointwise},
    {"reduce", reduce},
    {"gemm", gemm},
    {"conv_fwd", conv_fwd},
    {"conv_dx", conv_dx},
    {"conv_dw", conv_dw},
    {"winograd_filters", winograd_filters},
    {"standardize", standardize},
    {"moments", moments},
    {"join_moments", join_moments},
    {"project", project},
    {"project_tangent", project_tangent},
    {"log_softmax", log_softmax},
    {"max_pool", max_pool},
    {"pool_gather", pool_gather},
    {"pool_scatter", pool_scatter},
    {"avg_pool", avg_pool},
    {"avg_pool_adj", avg_pool_adj},
    {"one_hot", one_hot},
    {"fill", fill},
    {"cumsum", cumsum},
};

void check_counts(std::string_view kernel, Ints ints, std::span<const double> floats) {
  kernels::Arity arity;
  const auto given = static_cast<int64_t>(ints.size());
  if (!kernels::kernel_arity(kernel, ints.data(), given, &arity))
    reject("the ints are too few or make no sense (got " + std::to_string(given) + ")");
  if (arity.ints != given)
    reject(std::to_string(arity.ints) + " ints expected, got " + std::to_string(given));
  if (static_cast<int64_t>(floats.size()) < arity.floats)
    reject("at least " + std::to_string(arity.floats) + " floats expected, got " +
           std::to_string(floats.size()));
}

}  // namespace

Signature signature(std::string_view kernel, Ints ints, std::span<const double> floats,
                    kernels::DType dtype) {
  const auto row = std::ranges::find(kDescribe, kernel, &Describe::kernel);
  if (row == std::end(kDescribe)) reject("no kernel of this name; metafast._C.kernel_names() lists them");
  check_counts(kernel, ints, floats);
  Call call(ints, size_of(dtype));
  row->describe(call);
  return call.result;
}

}  // namespace metafast
