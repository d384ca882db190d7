// How far apart two cores are: what benchmarks print beside their times.
#pragma once
#include <optional>

namespace metafast {

// Seconds in which a cache line goes from the first to the last core this process may use and back: the median of some
// short exchanges between two threads, each held to its core where the system can do that. Nothing with one core, or
// where the system refuses. A millisecond, more where others want the cores.
std::optional<double> round_trip();

}  // namespace metafast
