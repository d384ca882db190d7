"""The machine a run takes place on: threads, subnormals, versions, roof, how far apart its cores are.

`bind` has to run before torch is imported: thread pools and compilers read the environment once, and a thread
takes its rounding and flushing mode from the thread that started it.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import platformdirs

POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PACKAGES = ("metafast", "torch", "numpy", "jax", "jaxlib", "learn2learn", "higher", "torchopt")


def cache_folder() -> Path:
    """Where oracle answers, trials and compiled peers lie: bench in `$METAFAST_CACHE` or in the user's cache."""
    held = os.environ.get("METAFAST_CACHE") or platformdirs.user_cache_dir("metafast", appauthor=False)
    return Path(held) / "bench"


def bind(threads: int) -> None:
    """Give every pool `threads` threads and the process as many cores (JAX goes by cores); before torch.

    What torch.compile and JAX compile goes into the cache, so that a trial elsewhere spares this process the wait.
    """
    if "torch" in sys.modules:
        raise RuntimeError("bench.machine.bind: torch is already imported, expected to be called before that")
    for name in POOLS:
        os.environ[name] = str(threads)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "inductor")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder() / "jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:threads])


def settle(threads: int) -> None:
    """Set torch's thread count, then flush subnormals: pool threads started later inherit the mode."""
    import torch

    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)


def flushes_everywhere() -> bool:
    """Whether every thread of torch's pool flushes: a large subnormal product is zero throughout."""
    import torch

    tiny = torch.full((1 << 22,), 1e-30)
    return not bool((tiny * 1e-10).any())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _vector_sets() -> list[str]:
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return [name for name in ("avx2", "fma", "avx512f", "avx512_vnni", "amx_tile") if name in flags]


def describe(threads: int) -> dict:
    """Processor, system, versions of whatever is installed, threads; what a result can't be read without."""
    return {
        "processor": _processor(),
        "vector_sets": _vector_sets(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "load_before": round(os.getloadavg()[0], 2),
    }


def _best(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some calls, two of them for warming up."""
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def roof(size: int = 2048, rounds: int = 5) -> dict:
    """GFLOP/s of a large float32 product (torch's or numpy's), GB/s of a large copy (read and write)."""
    import numpy as np
    import torch

    a, b = torch.rand(size, size), torch.rand(size, size)
    out = torch.empty(size, size)
    of_numpy = (a.numpy(), b.numpy(), np.empty((size, size), np.float32))
    flops = 2 * size**3
    rates = {
        "torch": flops / _best(lambda: torch.mm(a, b, out=out), rounds) / 1e9,
        "numpy": flops / _best(lambda: np.matmul(of_numpy[0], of_numpy[1], out=of_numpy[2]), rounds) / 1e9,
    }
    source = torch.rand(1 << 26 if size >= 2048 else 1 << 20)
    target = torch.empty_like(source)
    copied = 8 * source.numel() / _best(lambda: target.copy_(source), rounds) / 1e9
    return {"sgemm_gflops": max(rates.values()), "sgemm_by": rates, "copy_gbs": copied, "sgemm_size": size}


def round_trip() -> float | None:
    """Seconds in which a cache line goes to another core and back, a millisecond's median; None with one core.

    A host may move a virtual machine's cores: of two that share no cache, it takes several times as long.
    """
    from metafast import _C

    return _C.round_trip()


def memory_now() -> int:
    """Resident bytes of this process now."""
    return _status("VmRSS:")


def memory_peak() -> int:
    """Most resident bytes so far, or since `forget_peak`."""
    return _status("VmHWM:")


def forget_peak() -> None:
    """Start the peak anew from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: no {field} line, expected Linux")


def extent(values: list[float]) -> dict[str, float]:
    """Least, median and most."""
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def spread(values: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    if len(values) < 2:
        return values[0], 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), high - low
