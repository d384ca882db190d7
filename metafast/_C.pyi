"""The native runtime: programs, their replay over tasks and steps, and single kernels.

Addresses are plain integers (`tensor.data_ptr()`); what they point to is borrowed for the call. See csrc/program.hpp
for the sections and spaces of a program, csrc/kernels/common/kernels.hpp for the kernels and their ints and floats.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Instruction = tuple[Any, ...]
"""(kernel, operands as (space, byte offset), ints, floats); of `chunks` a fifth field: a list of instructions, its
members, whose operands are (space, byte offset, bytes from chunk to chunk)"""

CANCELLED: int
"""The status of a run stopped through `cancel_ptr`."""

MOST_GROUPS: int
"""Tasks run in at most so many groups, each on one thread."""

SOURCES: str
"""A digest of the C++ files that this was built from: `metafast.build.digest`."""

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
    def kept_bytes(self) -> int:
        """What a worker may hold of what kernels make of tensors that all tasks share."""

    def dump(self) -> str:
        """A listing, one line an instruction."""

class Binding:
    """Programs for so many tasks and steps, and what their externals are: tensors that are given, room that is made.

    **Arguments:**
    - `portions`: (program, T, externals) of each program: tasks, or blocks, that it does; for each external
      (tensor, offset, task stride, step stride), the last three in bytes.
    - `steps`: as for `run`.
    - `given`: (tensor, dtype) of each tensor that is read.
    - `rooms`: (key, tensor, shape, strides, zero, looked, summed) of each that is written, in the programs' dtype;
      strides count elements; `zero`: tasks add to what is 0 at first; the first `looked` elements are losses that are
      to be finite, the first `summed` make up the total.
    - `sums`: (key, offset, shape, strides) of each part of the accumulators, which the programs share, that is wanted.
    - `total`: whether the losses have a total.
    - `every`: as for `run`.
    """

    def __init__(
        self,
        portions: list[tuple[Program, int, list[tuple[int, int, int, int]]]],
        steps: int,
        given: list[tuple[int, Any]],
        rooms: list[tuple[Any, int, Sequence[int], Sequence[int], bool, int, int]],
        sums: list[tuple[Any, int, Sequence[int], Sequence[int]]],
        total: bool,
        every: int = 1,
    ) -> None: ...
    def run(
        self, tensors: list[Any], weights: Any | None, divisor: int, threads: int, losses: bool
    ) -> int | tuple[tuple[int, int, int, str, int] | None, dict[Any, Any], dict[Any, Any], bool, Any | None]:
        """Runs; (None, rooms, sums, whether losses are finite, their total, summed in double and divided), or first of
        all what `run` returns where that failed, and nothing behind it. Rooms and sums are new tensors by key; rooms of
        finite losses are among them only where `losses` asks for them.

        `tensors` has the tensors of `given`, `weights` is as for `run`. An int is the index of a tensor that cannot be
        read where it lies (another dtype, strides, a pending sign): nothing has run. Raises as `run` does.
        """

    def profile(self, tensors: list[Any], weights: Any | None) -> int | list[list[tuple[str, int, str, int, float]]]:
        """Runs on one thread; by program (section, instruction, kernel, calls, seconds in all) for every instruction,
        or an int as from `run`."""

class Places:
    """Places that held certain objects, and containers that had certain lengths; keeps all of them alive.

    `places` are (kind, owner, name, value): "item", `owner[name]`; "attribute", `getattr(owner, name)`; "type",
    `type(owner)`; "cell", `owner.cell_contents`; "empty cell", that there is none; "order", the tuple of the keys of a
    dict; "answer", `owner()`, which is to be equal (`name` is None in the last five).
    `sizes` are (container, length).
    """

    def __init__(self, places: list[tuple[str, Any, Any, Any]], sizes: list[tuple[Any, int]]) -> None: ...
    def hold(self) -> bool:
        """Whether every place holds the very object that it held, and every container is as long as it was."""

class Slots:
    """Entries of dictionaries that hold tensors, as (dict, key); `ties` are (number of a slot, dict, key) of further
    entries that are to hold the same as that slot. Keeps the dictionaries alive."""

    def __init__(
        self, slots: list[tuple[dict[str, Any], str]], ties: list[tuple[int, dict[str, Any], str]]
    ) -> None: ...
    def read(self) -> list[Any] | None:
        """What the slots hold. None where one is missing or holds None, a tie is broken, or two hold the same."""

class Facts:
    """What a plan depends on in tensors, values aside: class, shape, dtype, device, layout, requires_grad, nested."""

    def __init__(self, tensors: list[Any]) -> None: ...
    def hold(self, tensors: list[Any]) -> bool:
        """Whether these have the same, in the same order, and none was made in inference mode."""

class Repeat:
    """Whether a call is like the one before it, and what tensors it reads.

    **Arguments:**
    - `places`: all of which are to hold.
    - `options`: (name, value) of each entry that the dict given to `read` is to have.
    - `parameters`, `buffers`: the `Slots` that hold them.
    - `numbers`, `hyper`, `find_hyper`, `like`: as long as `numbers` hold, the hyper-parameters are the tensors `hyper`;
      else, or where it is None, `find_hyper` returns a tuple of them for parameter number `like`.
    - `externs`: weak references to tensors found elsewhere.
    - `facts`: of parameters, hyper-parameters, batches and externs in this order; `buffer_facts`: of buffers.
    - `batches`: how many tensors support and query have.
    """

    def __init__(
        self,
        places: list[Places],
        options: list[tuple[str, Any]],
        parameters: Slots,
        buffers: Slots,
        numbers: Places | None,
        hyper: tuple[Any, ...],
        find_hyper: Callable[[Any], tuple[Any, ...]],
        like: int,
        externs: list[Any],
        facts: Facts,
        buffer_facts: Facts,
        batches: tuple[int, int],
    ) -> None: ...
    def read(self, options: dict[str, Any], support: Any, query: Any) -> list[Any] | None:
        """The tensors of `facts`, then the buffers; None where anything is other than it was: places, options, ties,
        facts, or a tensor of a batch was made in inference mode. `support` and `query` are tuples of tensors; anything
        else is other than it was. Raises what `find_hyper` does."""

class Ready:
    """A call of which nothing is wanted but its total and its sums, made again and again.

    **Arguments:** `binding`, of programs that make room for losses alone, or for what nobody wants; `picks`, for each
    tensor of its `given` a number among the tensors of a call, or the tensor itself; `weights`, `divisor`, `threads`,
    as `Binding.run` has them; `places`, which are to hold.
    """

    def __init__(
        self, binding: Binding, picks: list[Any], weights: Any, divisor: int, threads: int, places: Places
    ) -> None: ...
    def run(self, tensors: list[Any]) -> tuple[Any, tuple[Any, ...]] | None:
        """The total and the sums, in their order, as new tensors. None, and nothing has happened, where the places do
        not hold, a tensor cannot be read where it lies, the replay failed or a loss is not finite: `Binding.run` says
        which. Raises as `run` does."""

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
    every: int = 1,
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
    - `every`: a thread holds the states of every so many steps, and those of one stretch between two of them: of
      `steps // every + every` in all; inner runs again for the others. No result depends on it.

    Statuses above 0 are the kernel's: 1, a label out of range. Where several task groups fail, the lowest is reported.

    On the main thread, signal handlers run some ten times a second during a long run; what one of them raises, such as
    KeyboardInterrupt, stops the run and is raised here.

    Raises ValueError before anything has run where the call makes no sense, MemoryError where memory is short.
    """

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

def round_trip() -> float | None:
    """Seconds of a cache line's way from the first to the last core of this process and back; None with one core."""

def isas() -> list[str]:
    """Instruction sets of both this build and this machine, the narrowest first."""

def vector_bytes() -> int:
    """Bytes of a vector of the widest of them: how many lanes a program interleaves best."""

def kernel_names() -> list[str]: ...
def pointwise_opcodes() -> list[str]:
    """Names of the operations of `pointwise`, in the order of their numbers."""

def winograd_pays(height: int, width: int, images: int, channels: int, columns: int) -> bool:
    """Whether float32 convolutions of 3×3 taps that write so many pixels and columns take Winograd's form."""

def winograd_down_pays(height: int, width: int, images: int, channels: int, columns: int) -> bool:
    """The same of the form that goes down the columns alone, against the direct one."""

def winograd_filter_elements(channels: int, columns: int) -> int:
    """Room for what the kernel `winograd_filters` writes."""

def code_pieces() -> int:
    """How many different pieces of machine code clusters have become in this process."""

def arena_bytes() -> int:
    """Bytes the workers hold between calls."""

def return_free_pages() -> None:
    """Gives back to the system what the C library keeps of freed memory, where that is 16 MiB or more and it can."""

def trim() -> None:
    """Gives the memory held between calls back."""
