"""The native runtime: programs, their replay over tasks and steps, and single kernels.

Addresses are plain integers (`tensor.data_ptr()`); what they point to is borrowed for the call. See csrc/program.hpp
for the sections and spaces of a program, csrc/kernels/common/kernels.hpp for the kernels and their ints and floats.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Instruction = tuple[str, Sequence[tuple[int, int]], Sequence[int], Sequence[float]]
"""(kernel, operands as (space, byte offset), ints, floats)"""

CANCELLED: int
"""The status of a run stopped through `cancel_ptr`."""

class Program:
    """What is run for one task; immutable, may be run by several threads.

    Raises ValueError naming section, instruction, kernel, what was expected and what was got.
    """

    def __init__(
        self,
        dtype: str,
        sections: Mapping[str, Sequence[Instruction]],
        arena_bytes: int = 0,
        state_bytes: int = 0,
        adjoint_bytes: int = 0,
        accumulator_bytes: int = 0,
        constants: bytes = b"",
        n_external: int = 0,
        lanes: int = 1,
        isa: str = "best",
    ) -> None: ...
    def dump(self) -> str:
        """A listing, one line an instruction."""

def run(
    program: Program,
    externals: npt.NDArray[np.int64],
    T: int,
    steps: int,
    steps_ptr: int = 0,
    weights_ptr: int = 0,
    result_ptr: int = 0,
    threads: int = 1,
    seed: int = 0,
    cancel_ptr: int = 0,
) -> tuple[int, int, int, str, int]:
    """Runs the program for all tasks; (status, task, step, section, instruction), status 0 where all went well.

    **Arguments:**
    - `externals`: (n_external, 3) int64, C-contiguous: pointer, task stride, step stride, in bytes.
    - `steps`: of every task; with `steps_ptr` (T,) int64 the most any task makes.
    - `T`: tasks, or blocks of `lanes` tasks of a program that interleaves them.
    - `weights_ptr`: (T * lanes,) of the program's dtype; 0: all ones.
    - `result_ptr`: accumulator_bytes, written only where the status is 0; 0: dropped.
    - `threads`: the calling one included. No result depends on it.
    - `seed`: reserved; no kernel draws random numbers yet.
    - `cancel_ptr`: an int32 polled before every section; other than 0 stops the run with status `CANCELLED`.

    Statuses above 0 are the kernel's: 1, a label out of range. Where several task groups fail, the lowest is reported.

    On the main thread, signal handlers run some ten times a second during a long run; what one of them raises, such as
    KeyboardInterrupt, stops the run and is raised here.

    Raises ValueError before anything has run where the call makes no sense, MemoryError where memory is short.
    """

def profile(
    program: Program,
    externals: npt.NDArray[np.int64],
    T: int,
    steps: int,
    steps_ptr: int = 0,
    weights_ptr: int = 0,
    result_ptr: int = 0,
) -> list[tuple[str, int, str, int, float]]:
    """Runs on one thread; (section, instruction, kernel, calls, seconds in all) for every instruction."""

def all_finite(pointer: int, count: int, dtype: str) -> bool:
    """Whether `count` elements ("f32" or "f64") from `pointer` on are all finite."""

def run_kernel(
    name: str,
    dtype: str,
    isa: str,
    ptrs: Sequence[int],
    ints: Sequence[int],
    floats: Sequence[float],
    parts: int = 1,
) -> int:
    """Runs one kernel, its parts one after the other; returns its status. Raises ValueError for wrong counts."""

def isas() -> list[str]:
    """Instruction sets of both this build and this machine, the narrowest first."""

def vector_bytes() -> int:
    """Bytes of a vector of the widest of them: how many lanes a program interleaves best."""

def kernel_names() -> list[str]: ...
def pointwise_opcodes() -> list[str]:
    """Names of the operations of `pointwise`, in the order of their numbers."""

def arena_bytes() -> int:
    """Bytes the workers hold between calls."""

def trim() -> None:
    """Gives the memory held between calls back."""
